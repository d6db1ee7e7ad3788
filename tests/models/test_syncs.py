"""How often a GPU is waited for, and given work before the blocks, found out without one.

On fake CUDA tensors, reading a value is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import aptvit
from aptvit.layers import patch_embed as embedding
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching import entropy, layout


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    for module in (entropy, embedding):  # kernels want a real one
        monkeypatch.setattr(module, "has_triton", lambda: False)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    tables = (layout._coarsest_starting,)
    for table in tables:  # real ones do not mix with fake ones
        table.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    for table in tables:
        table.cache_clear()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


class Launches(TorchDispatchMode):
    """Counts operators that a GPU would launch something for: all but views and empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.number += not (func.is_view or "empty" in func.name() or "unsafe_view" in func.name())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "most"), [({"keep": 0.6}, 70), ({"thresholds": (6.0, 6.0)}, 70), ({"thresholds": 6.0}, 65)], ids=str
)
def test_few_launches_before_the_blocks(
    make_host: Callable[..., Any], images: Tensor, options: dict[str, Any], most: int
) -> None:
    """On a GPU each takes longer than what it does there. Scoring is a kernel of its own there."""
    host = make_host("eva02_tiny_patch14_224", patch_size=16, depth=1)
    model = aptvit.adapt(host, scorer=scores_of_nothing, window_size=4, resize_only=True, **options)
    _, layout = model.embed(images)  # makes tables that are kept
    with Launches() as launches:
        model.embed(images)
    with torch.no_grad(), Launches() as of_check:
        assert model.packed_encoder.derived.check().current(waited=False)
    assert of_check.number <= 5
    assert launches.number - of_check.number <= most and not layout.is_uniform


def scores_of_nothing(pixels: Tensor, patch_size: int, factors: list[int]) -> dict[int, Tensor]:
    rows, cols = (side // patch_size for side in pixels.shape[2:])
    first = pixels[:, 0, :rows, :cols] / 32
    return {factor: first[:, : rows // factor, : cols // factor] for factor in factors}


scores_of_nothing.name = "nothing"  # type: ignore[attr-defined]  # scores of nameless callables are checked for NaN


def on_fake_gpu(model: AdaptivePatchTransformer) -> AdaptivePatchTransformer:
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[int]]], list[int]]:
    """Answers the one question that needs a wait, and counts how often it is asked."""

    def answer_with(counts: list[list[int]], in_windows: list[list[int]] | None = None) -> list[int]:
        asked: list[int] = []

        def count(scale_map: Tensor, *_: Any) -> tuple[list[list[int]], list[list[int]]]:
            asked.append(len(scale_map))
            return counts, in_windows or []

        monkeypatch.setattr(layout, "_count", count)
        return asked

    return answer_with


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize(
    "budget", [{"thresholds": (6.0, 6.0)}, {"keep": 0.6}, {"keep": 0.6, "scorer": "preview"}], ids=str
)
@pytest.mark.parametrize("training", [False, True])
def test_one_wait_for_each_batch(
    make_host: Callable[..., Any],
    images: Tensor,
    request: pytest.FixtureRequest,
    counted: Callable[[list[list[int]]], list[int]],
    name: str,
    budget: dict[str, Any],
    training: bool,
) -> None:
    model = aptvit.adapt(make_host(name, patch_size=16), **budget).train(training)
    counts = model.layout(images).counts
    assert any(coarse for _, *coarse in counts)
    request.getfixturevalue("fake_gpu")
    asked = counted(counts)
    on_fake_gpu(model)
    with torch.set_grad_enabled(training):
        assert model(torch.empty(images.shape, device="cuda")).device.type == "cuda"
    assert asked == [len(images)]


@pytest.mark.parametrize("budget", [{"thresholds": (6.0, 6.0)}, {"keep": 0.6, "scorer": "preview"}], ids=str)
def test_windows_need_no_wait_of_their_own(
    make_host: Callable[..., Any],
    images: Tensor,
    request: pytest.FixtureRequest,
    counted: Callable[..., list[int]],
    budget: dict[str, Any],
) -> None:
    host = make_host("vit_tiny_patch16_224", class_token=False, global_pool="avg")
    model = aptvit.adapt(host, **budget, window_size=4, global_blocks=[1])
    result = model.layout(images)
    assert result.window_packing is not None
    runs = torch.tensor(result.window_packing.seqlens).view(len(images), -1).tolist()
    request.getfixturevalue("fake_gpu")
    asked = counted(result.counts, runs)
    on_fake_gpu(model)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.empty(images.shape, device="cuda"), indices=2, intermediates_only=True)
    assert all(one.device.type == "cuda" for one in maps)
    assert asked == [len(images)]


def test_one_wait_for_images_of_many_sizes(
    make_host: Callable[..., Any],
    images: Tensor,
    request: pytest.FixtureRequest,
    counted: Callable[[list[list[int]]], list[int]],
) -> None:
    sizes = [(128, 128), (64, 96), (128, 128)]
    model = aptvit.adapt(make_host(), thresholds=6.0)
    counts = model.layout([image[:, :h, :w] for image, (h, w) in zip(images, sizes, strict=False)]).counts
    request.getfixturevalue("fake_gpu")
    asked = counted(counts)
    on_fake_gpu(model)
    with torch.no_grad():
        model([torch.empty(3, *size, device="cuda") for size in sizes])
    assert asked == [3]


def test_a_second_wait_would_be_noticed(fake_gpu: FakeTensorMode) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device="cuda").sum().item()
    with pytest.raises(Exception, match=r"nonzero|[Dd]ynamic|data-dependent"):
        torch.ones(3, device="cuda").nonzero().tolist()
