"""What only a GPU shows. `benchmarks/gpu.sh tests` runs it there; elsewhere it is skipped."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import aptvit
from aptvit.layers.kernels.attention_flash import Backend, available_backends
from aptvit.layers.kernels.packed_attention import packed_attention
from aptvit.patching.layout import Packing, PatchLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
MODELS = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224")
# Relative distance allowed; single precision computes convolutions with TF32.
DTYPES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TWICE: dict[str, Any] = {"keep": 0.6, "scorer": "preview"}
BUDGETS: tuple[dict[str, Any], ...] = ({"thresholds": (6.0, 6.0)}, {"keep": 0.6})


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative, in double precision; NaN where anything is."""
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


def waits(run: Callable[[], Any]) -> list[str]:
    """What PyTorch says each time that the GPU is waited for."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in caught if "synchroniz" in str(one.message)]


def head_sizes() -> list[int]:
    """All that docs/reference/models.md lists."""
    rows = re.findall(r"^\| `[^|]*\|[^|]*\|[^|]*\|[^|]*\|[^|]*\| (\d+) \|", MODELS.read_text(), re.MULTILINE)
    return sorted(set(map(int, rows)))


def test_all_head_sizes_are_found() -> None:
    assert {64, 80, 88, 128} <= set(head_sizes())


@pytest.mark.parametrize("head_size", head_sizes())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [one for one in available_backends() if one != "sdpa"])
def test_packed_attention_of_every_head_size(backend: Backend, dtype: torch.dtype, head_size: int) -> None:
    packing = Packing.from_seqlens([5, 1, 197, 33], DEVICE)
    q, k, v = (torch.randn(1, 3, packing.num_tokens, head_size, device=DEVICE, dtype=dtype) for _ in range(3))
    exact = packed_attention(q.double(), k.double(), v.double(), packing, packing, backend="sdpa")
    assert distance(packed_attention(q, k, v, packing, packing, backend=backend), exact) < DTYPES[dtype] / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_batch_is_its_images_and_what_a_cpu_computes(
    make_host: Callable[..., Any], images: Tensor, name: str, dtype: torch.dtype, budget: dict[str, Any]
) -> None:
    model = aptvit.adapt(make_host(name, patch_size=16), **budget)
    layout = model.layout(images)
    assert any(coarse for _, *coarse in layout.counts)
    with torch.no_grad():
        expected = model(images)
        model.to(DEVICE, dtype)
        there = images.to(DEVICE)
        found = model.layout(there)
        assert torch.equal(found.scale_map.cpu(), layout.scale_map)
        together = model(there)
        alone = torch.cat([model(image[None]) for image in there])
    assert together.dtype == dtype
    assert distance(together, expected) < DTYPES[dtype]
    assert distance(alone, expected) < DTYPES[dtype]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_two_passes_are_those_of_a_cpu(
    make_host: Callable[..., Any], images: Tensor, name: str, dtype: torch.dtype, bias: float
) -> None:
    model = aptvit.adapt(make_host(name, patch_size=16), scorer="preview", keep=0.6, area_bias=bias)
    layout = replace(model.layout(images), cache=None)  # which patches, whatever a GPU would choose
    uneven = torch.randperm(64).view(1, 8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :8, :8] < 20
    ragged = PatchLayout.from_scale_map(
        torch.cat([layout.scale_map[:-1], uneven.to(torch.int8)]), 16, 2, layout.num_prefix_tokens
    )
    with torch.no_grad():
        expected = [model(images, layout=one) for one in (layout, ragged)]
        model.to(DEVICE, dtype)
        for one, its in zip((layout, ragged), expected, strict=True):
            there = PatchLayout.from_scale_map(one.scale_map.to(DEVICE), 16, 2, layout.num_prefix_tokens)
            assert distance(model(images.to(DEVICE), layout=there), its) < DTYPES[dtype]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_merged_is_as_near_to_timm_as_timm_is_to_itself(
    make_host: Callable[..., Any], images: Tensor, name: str, dtype: torch.dtype
) -> None:
    """Two of timm's own attention backends differ by rounding; so may this."""
    host = make_host(name, patch_size=16).to(DEVICE, dtype)
    there = images.to(DEVICE, dtype)
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            plain = host(there)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            fused = host(there)
        got = aptvit.adapt(host, thresholds=(0.0, 0.0))(there)
        default = host(there)
    spread = max(distance(fused, plain), torch.finfo(dtype).eps)
    assert distance(got, default) <= 2 * spread


@pytest.mark.parametrize("budget", [*BUDGETS, TWICE], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_pass_waits_once(
    make_host: Callable[..., Any], images: Tensor, budget: dict[str, Any], training: bool
) -> None:
    model = aptvit.adapt(make_host().to(DEVICE), **budget).train(training)
    there = images.to(DEVICE)
    with torch.set_grad_enabled(training):
        model(there)  # what is made once: kernels, tables
        found = waits(lambda: model(there))
    assert len(found) <= 1, found


def test_a_wait_is_noticed() -> None:
    one = torch.ones(1, device=DEVICE)
    assert waits(one.item)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_graphs_give_what_launches_give(make_host: Callable[..., Any], images: Tensor, budget: dict[str, Any]) -> None:
    model = aptvit.adapt(make_host(), **budget).to(DEVICE, torch.bfloat16)
    there = images.to(DEVICE)
    with torch.inference_mode():
        expected = [model(batch) for batch in (there, there[:1], there.flip(0))]
        model.use_cuda_graphs(token_bucket=64)
        for _ in range(2):  # recorded, then replayed
            for batch, one in zip((there, there[:1], there.flip(0)), expected, strict=True):
                assert distance(model(batch), one) < DTYPES[torch.bfloat16]


def test_graphs_hold_maps_and_windows(make_host: Callable[..., Any], images: Tensor) -> None:
    options: dict[str, Any] = {"window_size": 2, "global_blocks": [1], "area_bias": 0.5}
    model = aptvit.adapt(make_host("eva02_tiny_patch14_224", patch_size=16), thresholds=6.5, **options)
    model.to(DEVICE, torch.bfloat16)
    there = images.to(DEVICE)
    with torch.inference_mode():
        for thresholds in ((6.5,), (-1.0,)):
            model.thresholds = thresholds
            model.use_cuda_graphs(False)
            expected = model.forward_intermediates(there, indices=[0, 1], intermediates_only=True)
            model.use_cuda_graphs(token_bucket=64)
            for _ in range(2):
                got = model.forward_intermediates(there, indices=[0, 1], intermediates_only=True)
                for one, other in zip(got, expected, strict=True):
                    assert distance(one, other) < DTYPES[torch.bfloat16]


@pytest.mark.parametrize("options", [{}, {"window_size": 2, "global_blocks": [1]}], ids=["images", "windows"])
def test_graphs_hold_both_passes(make_host: Callable[..., Any], images: Tensor, options: dict[str, Any]) -> None:
    model = aptvit.adapt(make_host("eva02_tiny_patch14_224", patch_size=16), **TWICE, **options)
    model.to(DEVICE, torch.bfloat16)
    there = images.to(DEVICE)
    with torch.inference_mode():
        layout = model.layout(there)
        expected = model(there, layout)
        model.use_cuda_graphs(token_bucket=64)
        for _ in range(2):
            assert distance(model(there, replace(layout, cache=None)), expected) < DTYPES[torch.bfloat16]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_gradients_are_those_of_the_cpu(make_host: Callable[..., Any], images: Tensor, budget: dict[str, Any]) -> None:
    model = aptvit.adapt(make_host(), **budget).train()
    labels = torch.arange(len(images))

    def gradients(device: str) -> list[Tensor]:
        model.to(device).zero_grad()
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        return [torch.zeros_like(one) if one.grad is None else one.grad.cpu() for one in model.parameters()]

    for got, expected in zip(gradients(DEVICE), gradients("cpu"), strict=True):
        assert float((got.cpu() - expected.cpu()).norm()) <= 1e-2 * float(expected.norm()) + 1e-5


@pytest.mark.parametrize("scorer", ["laplacian", "upsample", "embedding"])
def test_scores_are_those_of_the_cpu(make_host: Callable[..., Any], photos: list[Tensor], scorer: str) -> None:
    model = aptvit.adapt(make_host(), thresholds=(1.0, 1.0), scorer=scorer)
    batch = torch.stack([photo[:, :256, :256] for photo in photos])
    ((_, expected),) = model.scores(batch)
    ((_, got),) = model.to(DEVICE).scores(batch.to(DEVICE))
    for factor, scores in expected.items():
        torch.testing.assert_close(got[factor].cpu(), scores, rtol=2e-3, atol=2e-3 * float(scores.abs().max()))
