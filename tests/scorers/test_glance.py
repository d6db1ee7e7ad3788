from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.scorers.foresight import GLANCE, Foresight, glance_inputs, teach
from aptvit.scorers.glance import GlanceScorer, _examples

Host = Callable[..., Any]


def attention_of_host(host: Any, images: Tensor, last: int) -> Tensor:
    """(B, h/2, w/2) by hooks on timm's own forward: attention of the class token in the last blocks, summed by 2x2."""
    seen: list[Tensor] = []
    handles = [block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in host.blocks]
    host(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for block, x in list(zip(host.blocks, seen, strict=True))[-last:]:
        q, k, _ = block.attn.qkv(x).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((q * block.attn.scale) @ k.transpose(2, 3)).softmax(-1)  # (B, H, N, N)
        total = total + weights[:, :, 0, host.num_prefix_tokens :].mean(1)
    side = images.shape[2] // 16
    return F.avg_pool2d(total.unflatten(1, (side, side))[:, None], 2)[:, 0] * 4


@torch.no_grad()
def test_it_learns_the_attention_of_the_last_third_of_the_blocks(make_host: Host, images: Tensor) -> None:
    host = make_host(depth=4)
    model = aptvit.adapt(host, scorer="glance", keep=0.5)
    _, logs = _examples(model.packed_encoder, images)
    expected = attention_of_host(host, images, 2).log()
    torch.testing.assert_close(logs, expected - expected.mean((1, 2), keepdim=True), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224"])
def test_it_looks_with_the_first_block_at_all_big_patches(make_host: Host, name: str, images: Tensor) -> None:
    """The tokens that it reads are those of the model with everything merged, after its first block."""
    model = aptvit.adapt(make_host(name), scorer="glance", keep=0.5)
    distances = torch.rand(len(images), 4, 4)
    inputs = glance_inputs(model.packed_encoder, images, distances)
    merged = aptvit.adapt(make_host(name), thresholds=1e9)
    merged.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(GLANCE)})
    (pair,) = merged.forward_intermediates(images, indices=[0], return_prefix_tokens=True, intermediates_only=True)
    tokens, prefix = pair
    width = tokens.shape[1]
    expected = F.layer_norm(tokens[:, :, ::2, ::2].permute(0, 2, 3, 1), (width,))
    torch.testing.assert_close(inputs[..., :width], expected, rtol=1e-3, atol=1e-3)
    if prefix.shape[1]:
        first = F.layer_norm(prefix[:, :1, None], (width,)).expand_as(expected)
        torch.testing.assert_close(inputs[..., width : 2 * width], first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inputs[..., 2 * width], distances.log())


def test_what_it_foresees_gets_better_by_fitting(make_host: Host, crops: Tensor) -> None:
    host = make_host(depth=3)
    model = aptvit.adapt(host, scorer="glance", keep=0.5)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ValueError, match="the glance knows nothing yet"):
        model(crops[:2])
    quality = aptvit.fit_glance(model, crops.split(7), epochs=60)
    assert 0.1 < quality <= 1
    assert all(torch.equal(host.state_dict()[name], value) for name, value in before.items())
    assert len(set(model.layout(crops).seqlens)) == 1
    again = aptvit.adapt(host, scorer="glance", keep=0.5)
    assert aptvit.fit_glance(again, crops.split(7), epochs=60) == quality
    assert torch.equal(again.coarse_glance.w1, model.coarse_glance.w1)


def test_copies_of_an_image_are_held_back_together(make_host: Host) -> None:
    """What was learned by heart from a copy is not foreseen."""
    model = aptvit.adapt(make_host(), scorer="glance", keep=0.5)
    width = len(getattr(model, GLANCE).mean)
    inputs, truth = (torch.randn(30, 1, 1, size).repeat_interleave(2, 0) for size in (width, 1))
    apart, together = (
        teach(model, [(inputs, truth)], Foresight(200, 0, lambda guess, truth: (guess - truth).square(), copies))
        for copies in (1, 2)
    )
    assert together < 0.3 < 0.7 < apart


def test_scores_are_attention_times_the_root_of_the_distance(make_host: Host, crops: Tensor) -> None:
    model = aptvit.adapt(make_host(), scorer="glance", scales=3, keep=0.5)
    aptvit.fit_glance(model, crops, epochs=3)
    ((_, scores),) = model.scores(crops)
    distances = model.patchifier.scorer.distance.score_images(crops, (0.5,) * 3, (0.5,) * 3, 16, (2, 4))
    expected = (
        model.coarse_glance(glance_inputs(model.packed_encoder, crops, distances[2])).exp().view(-1, 4, 4).detach().numpy()
    )
    np.testing.assert_allclose(scores[2], expected * distances[2].numpy() ** 0.25, rtol=1e-4)
    whole = expected.reshape(-1, 2, 2, 2, 2).sum((2, 4))
    np.testing.assert_allclose(scores[4], whole * distances[4].numpy() ** 0.25, rtol=1e-4)


def test_it_travels_with_the_model(make_host: Host, crops: Tensor, tmp_path: Any) -> None:
    model = aptvit.adapt(make_host(), scorer="glance", keep=0.6)
    aptvit.fit_glance(model, crops, epochs=2)
    expected = model(crops[:4])
    names = set(model.state_dict()) - set(make_host().state_dict())
    assert all(name.startswith(("coarse_embed.", "coarse_glance.")) for name in names)
    assert not any(name.startswith("coarse_glance") for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(aptvit.from_pretrained(tmp_path)(crops[:4]), expected)
    assert torch.equal(copy.deepcopy(model)(crops[:4]), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(crops[:4]), expected)


@pytest.mark.parametrize("size", [(112, 128), (128, 80), (48, 144), (32, 16)])
def test_any_size_and_odd_grids(make_host: Host, crops: Tensor, size: tuple[int, int]) -> None:
    model = aptvit.adapt(make_host(), scorer="glance", scales=3, thresholds=(math.inf, -1.0))
    aptvit.fit_glance(model, crops, epochs=1)
    layout = model.layout(torch.rand(3, 3, *size))
    rows, cols = size[0] // 16, size[1] // 16
    assert set(layout.seqlens) == {1 + rows * cols - 3 * (rows // 2) * (cols // 2)}


def test_training_mode_leaves_the_host_as_it_was(make_host: Host, crops: Tensor) -> None:
    model = aptvit.adapt(make_host(drop_path_rate=0.5), scorer="glance", keep=0.5).eval()
    aptvit.fit_glance(model, crops, epochs=1)
    expected = model.layout(crops[:4]).scale_map
    model.train()
    assert torch.equal(model.layout(crops[:4]).scale_map, expected)
    assert all(module.training for module in model.modules())
    model(crops[:4]).sum().backward()


def test_models_without_a_class_token_share_their_attention(crops: Tensor) -> None:
    import timm

    host = timm.create_model("vit_base_patch16_siglip_224", embed_dim=48, num_heads=2, depth=3, img_size=128).eval()
    model = aptvit.adapt(host, scorer="glance", keep=0.5)
    assert math.isfinite(aptvit.fit_glance(model, crops, epochs=1))
    assert model(crops[:2]).isfinite().all()


def test_what_cannot_be_fitted_is_refused(make_host: Host, crops: Tensor) -> None:
    with pytest.raises(ValueError, match="this model has no glance"):
        aptvit.fit_glance(aptvit.adapt(make_host()), crops)
    model = aptvit.adapt(make_host(), scorer="glance")
    assert isinstance(model.patchifier.scorer, GlanceScorer)
    for images in ([], crops[:, :, :16, :16]):
        with pytest.raises(ValueError, match="no images to learn from"):
            aptvit.fit_glance(model, images)
