"""Towers of transformers attend through its registry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import aptvit
import aptvit.hosts.transformers_attention
from aptvit.layers.attention import AttentionHandler, BlockAttention, Segments, run_block
from aptvit.patching.layout import Packing

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
IMAGES = {"image_size": 128, "patch_size": 16}
HOSTS = {
    "ViT": ("ViTModel", "ViTConfig", {}),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {}),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2}),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", {}),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", {}),
}


def make(name: str) -> Any:
    model, config, options = HOSTS[name]
    return getattr(transformers, model)(getattr(transformers, config)(**SIZES, **IMAGES, **options)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_no_call_is_watched_and_the_answer_is_the_same(
    name: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make(name)
    model = aptvit.adapt(host, thresholds=6.5)
    assert not model.layout(images).packing.is_dense
    with monkeypatch.context() as patch:
        patch.setattr(AttentionHandler, "__enter__", lambda _: pytest.fail("watches"))
        got = model(images).pooler_output
    for block in model.adapter.blocks:
        assert block.num_redirected == 1
        block.num_redirected = 0
    torch.testing.assert_close(model(images).pooler_output, got, rtol=1e-5, atol=1e-5)
    assert host.config._attn_implementation == "sdpa"  # the host is as it was
    assert all(not hasattr(block, "num_redirected") for block in host.modules())


@torch.no_grad()
def test_a_block_that_drops_the_registry_is_watched(images: Tensor) -> None:
    """Its calls are counted: none came by."""
    model = aptvit.adapt(make("ViT"), thresholds=6.5)
    expected = model(images).last_hidden_state
    for module in model.adapter.core.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    got = model(images).last_hidden_state
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert all(block.num_redirected == 0 for block in model.adapter.blocks)
    for module in model.adapter.core.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="would see each other"):
        model(images)


@torch.no_grad()
def test_outside_of_packed_sequences_it_is_sdpa_with_masks() -> None:
    """A padded batch of SigLIP 2 keeps its mask."""
    options = {**SIZES, "patch_size": 16, "num_patches": 64}
    host = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**options)).eval()
    rows = torch.randn(2, 64, 3 * 16 * 16)
    mask, shapes = torch.ones(2, 64, dtype=torch.long), torch.tensor([[8, 8], [4, 8]])
    mask[1, 32:] = 0
    expected = host(rows, mask, shapes).last_hidden_state
    registered = copy.deepcopy(host)
    aptvit.hosts.transformers_attention.attend_by_registry(registered, [])
    got = registered(rows, mask, shapes).last_hidden_state
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1, :32], expected[1, :32])
    rows[1, 32:] += 5.0
    torch.testing.assert_close(registered(rows, mask, shapes).last_hidden_state[1, :32], expected[1, :32])


class Masked(nn.Module):
    """Attends with what hosts may hand over."""

    is_causal = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        forward = aptvit.hosts.transformers_attention.attention_forward
        return forward(self, q, q, q, **self.options)[0].flatten(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "no mask"),
        ({"is_causal": True}, "no mask"),
        ({"softcap": 30.0}, "no softcap"),
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "no position_bias"),
    ],
)
def test_masks_and_biases_are_refused(options: dict[str, Any], message: str) -> None:
    block, packing = Masked(**options), Packing.from_seqlens([2, 3])
    block.num_redirected = 1
    with pytest.raises(ValueError, match=message):
        run_block(block, torch.randn(1, 5, 8), {}, BlockAttention(Segments(packing, packing), packing))


@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_gradients_and_checkpointing(name: str, images: Tensor) -> None:
    results = []
    for watched, checkpointing in ((True, False), (False, False), (False, True)):
        torch.manual_seed(0)
        model = aptvit.adapt(make(name), thresholds=6.5).train()
        model.set_grad_checkpointing(checkpointing)
        for block in model.adapter.blocks:
            block.num_redirected = 0 if watched else block.num_redirected
        model(images).pooler_output.square().sum().backward()
        results.append([p.grad for p in model.adapter.blocks.parameters()])
    for gradients in results[1:]:
        for one, two in zip(gradients, results[0], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_graph_serves_all_lengths(images: Tensor) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    model = aptvit.adapt(make("ViT"), thresholds=6.5)
    expected = {threshold: model(images, thresholds=threshold).pooler_output for threshold in (6.5, 6.8, 6.2, 5.9)}
    model.compile(backend=counter, fullgraph=True)
    graphs = []
    for threshold, target in expected.items():
        torch.testing.assert_close(model(images, thresholds=threshold).pooler_output, target, rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and len(set(graphs)) == 1
    torch.compiler.reset()


def test_saved_configurations_do_not_name_it(tmp_path: Any) -> None:
    aptvit.adapt(make("ViT"), keep=0.5).save_pretrained(tmp_path)
    assert '"aptvit"' not in (tmp_path / "config.json").read_text().replace('"aptvit": {', "")
    assert torch.isfinite(aptvit.from_pretrained(tmp_path)(torch.rand(1, 3, 128, 128)).pooler_output).all()
