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
from aptvit.scorers.glance import GlanceScorer, _examples
from aptvit.scorers.learned import GLANCE, FitOptions, fit_network, glance_inputs

Host = Callable[..., Any]


SIGLIP = "vit_base_patch16_siglip_224"  # without prefix tokens


def attention_of_host(host: Any, images: Tensor, last: int) -> Tensor:
    """(B, h/2, w/2) by hooks on timm's own forward: attention of the class token, or without one the mean over all
    tokens, in the last blocks, summed by 2x2."""
    received: list[Tensor] = []
    handles = [block.attn.register_forward_pre_hook(lambda _, args: received.append(args[0])) for block in host.blocks]
    host(images)
    for handle in handles:
        handle.remove()
    total = 0.0
    for block, x in list(zip(host.blocks, received, strict=True))[-last:]:
        q, k, _ = block.attn.qkv(x).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((q * block.attn.scale) @ k.transpose(2, 3)).softmax(-1)  # (B, H, N, N)
        seen_by = weights[:, :, 0] if host.num_prefix_tokens else weights.mean(2)
        total = total + seen_by[:, :, host.num_prefix_tokens :].mean(1)
    return F.avg_pool2d(total.unflatten(1, (images.shape[2] // 16, -1))[:, None], 2)[:, 0] * 4


def centred(logs: Tensor) -> Tensor:
    """Logarithms up to a constant of the image."""
    return logs - logs.mean((1, 2), keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "depth", "last", "size"),
    [
        ("vit_tiny_patch16_224", 4, 2, (128, 128)),
        ("vit_tiny_patch16_224", 3, 1, (112, 80)),
        (SIGLIP, 3, 1, (128, 128)),
        (SIGLIP, 4, 2, (48, 112)),
    ],
)
def test_it_learns_the_attention_of_the_last_third_of_the_blocks(
    make_host: Host, images: Tensor, name: str, depth: int, last: int, size: tuple[int, int]
) -> None:
    host = make_host(name, embed_dim=48, num_heads=2, depth=depth, img_size=size)
    images = images[:, :, : size[0], : size[1]]
    model = aptvit.adapt(host, scorer="glance", keep=0.5)
    _, logs = _examples(model.packed_encoder, images)
    torch.testing.assert_close(logs, centred(attention_of_host(host, images, last).log()), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (112, 80)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", SIGLIP])
def test_it_looks_with_the_first_block_at_all_big_patches(
    make_host: Host, name: str, size: tuple[int, int], images: Tensor
) -> None:
    """The tokens that it reads are those of the model with everything merged, after its first block."""
    host = make_host(name, embed_dim=96, num_heads=2, img_size=size)
    model = aptvit.adapt(host, scorer="glance", keep=0.5)
    images = images[:, :, : size[0], : size[1]]
    rows, cols = size[0] // 16, size[1] // 16
    distances = torch.rand(len(images), rows // 2, cols // 2)
    inputs = glance_inputs(model.packed_encoder, images, distances)
    merged = aptvit.adapt(host, thresholds=1e9)
    merged.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith(GLANCE)})
    (pair,) = merged.forward_intermediates(images, indices=[0], return_prefix_tokens=True, intermediates_only=True)
    tokens, prefix = pair
    width = tokens.shape[1]
    corners = tokens[:, :, : rows // 2 * 2 : 2, : cols // 2 * 2 : 2].permute(0, 2, 3, 1)
    expected = F.layer_norm(corners, (width,))
    torch.testing.assert_close(inputs[..., :width], expected, rtol=1e-3, atol=1e-3)
    in_common = expected.mean((1, 2), keepdim=True)
    whole = F.layer_norm(prefix[:, :1, None], (width,)) if prefix.shape[1] else in_common
    torch.testing.assert_close(inputs[..., width : 2 * width], whole.expand_as(expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inputs[..., 2 * width], distances.log())
    for row in range(rows // 2):
        for col in range(cols // 2):  # of the centre, from -1 to 1
            y, x = (2 * row + 1) / rows * 2 - 1, (2 * col + 1) / cols * 2 - 1
            waves = [f(math.pi * side / 2) for side in (x, y) for f in (math.sin, math.cos)]
            place = torch.tensor([x, y, x * x, y * y, x * y, *waves]).expand(len(images), -1)
            torch.testing.assert_close(inputs[:, row, col, 2 * width + 1 :], place)


def test_what_it_foresees_gets_better_by_fitting(make_host: Host, crops: Tensor) -> None:
    host = make_host(depth=3)
    model = aptvit.adapt(host, scorer="glance", keep=0.5)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ValueError, match="the network of this scorer is not trained yet"):
        model(crops[:2])
    at_first = aptvit.fit_glance(model, crops.split(7), epochs=1)
    quality = aptvit.fit_glance(model, crops.split(7), epochs=60)
    assert quality > at_first + 0.1
    assert all(torch.equal(host.state_dict()[name], value) for name, value in before.items())
    again = aptvit.adapt(host, scorer="glance", keep=0.5)
    assert aptvit.fit_glance(again, crops.split(7), epochs=60) == quality
    assert torch.equal(again.coarse_glance.w1, model.coarse_glance.w1)
    # The share of the squares of what is to be known that is foreseen, of every tenth image.
    held = model.patchifier.normalization.normalised(crops[9::10])
    with torch.no_grad():
        truth = centred(attention_of_host(host, held, 1).log())
        distances = model.patchifier.scorer.distance.score_images(held, (0.5,) * 3, (0.5,) * 3, 16, (2,))[2]
        guess = centred(model.coarse_glance(glance_inputs(model.packed_encoder, held, distances))[..., 0])
    assert quality == pytest.approx(float(1 - (guess - truth).square().sum() / truth.square().sum()), abs=1e-3)
    # What it was fitted on is foreseen too, in the scores that patches are chosen by.
    ((_, scores),) = model.scores(crops)
    order = scores[2].flatten(1).argsort(1)
    for scale_map, places in zip(model.layout(crops).scale_map, order.tolist(), strict=True):
        coarse = torch.zeros(4, 4).flatten()
        coarse[places[:11]] = 1  # of 64 tokens, 33 go
        assert torch.equal(scale_map[::2, ::2].flatten().float(), coarse)
        assert torch.equal(scale_map, scale_map[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_copies_of_an_image_are_held_back_together(make_host: Host) -> None:
    """What was learned by heart from a copy is not foreseen."""
    model = aptvit.adapt(make_host(), scorer="glance", keep=0.5)
    width = len(getattr(model, GLANCE).mean)
    inputs, truth = (torch.randn(30, 1, 1, size).repeat_interleave(2, 0) for size in (width, 1))
    apart, joint = (
        fit_network(model, [(inputs, truth)], FitOptions(200, 0, lambda guess, truth: (guess - truth).square(), copies))
        for copies in (1, 2)
    )
    assert joint < 0.3 < 0.7 < apart


@pytest.mark.parametrize("size", [(128, 128), (112, 128), (128, 80), (48, 144), (32, 16)])
def test_scores_are_attention_times_the_root_of_the_distance_at_any_size(
    make_host: Host, crops: Tensor, size: tuple[int, int]
) -> None:
    model = aptvit.adapt(make_host(), scorer="glance", scales=3, thresholds=(math.inf, -1.0))
    aptvit.fit_glance(model, crops, epochs=1)
    images = torch.cat([crops, crops], dim=3)[:3, :, : size[0], : size[1]]
    rows, cols = size[0] // 16, size[1] // 16
    ((_, scores),) = model.scores(images)
    distances = model.patchifier.scorer.distance.score_images(images, (0.5,) * 3, (0.5,) * 3, 16, (2, 4))
    with torch.no_grad():
        if cols > 1:
            inputs = glance_inputs(model.packed_encoder, images, distances[2])
            attention = model.coarse_glance(inputs)[..., 0].exp().numpy()
        else:
            attention = np.zeros((3, 1, 0))  # it has no patch to look at
    for factor, parts in ((2, 1), (4, 2)):
        expected = np.zeros((3, rows // factor, cols // factor))
        for row, col in np.ndindex(expected.shape[1:]):
            inside = attention[:, row * parts : (row + 1) * parts, col * parts : (col + 1) * parts]
            expected[:, row, col] = inside.sum((1, 2)) * distances[factor][:, row, col].numpy() ** 0.25
        np.testing.assert_allclose(scores[factor], expected, rtol=1e-4)
    scale_map = torch.zeros(3, rows, cols, dtype=torch.int8)
    scale_map[:, : rows // 2 * 2, : cols // 2 * 2] = 1
    assert torch.equal(model.layout(images).scale_map, scale_map)


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


def test_training_mode_leaves_the_host_as_it_was(make_host: Host, crops: Tensor) -> None:
    """A step of training is the one with the layout of evaluation: same random numbers, same gradients."""
    host = make_host(drop_path_rate=0.5, proj_drop_rate=0.3)  # its first block drops no path
    model = aptvit.adapt(host, scorer="glance", keep=0.5).eval()
    aptvit.fit_glance(model, crops, epochs=1)
    expected = model.layout(crops[:4])
    model.train()
    assert torch.equal(model.layout(crops[:4]).scale_map, expected.scale_map)
    assert all(module.training for module in model.modules())
    grads: list[dict[str, Tensor]] = []
    for layout in (None, expected):
        torch.manual_seed(1)
        model.zero_grad()
        model(crops[:4], layout=layout).square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)
    assert all(grads[0][name].any() for name, _ in model.named_parameters() if name.startswith(("blocks", "patch")))


def test_what_cannot_be_fitted_is_refused(make_host: Host, crops: Tensor) -> None:
    with pytest.raises(ValueError, match="this model has no glance"):
        aptvit.fit_glance(aptvit.adapt(make_host()), crops)
    model = aptvit.adapt(make_host(), scorer="glance")
    assert isinstance(model.patchifier.scorer, GlanceScorer)
    for images in ([], crops[:, :, :16, :16]):
        with pytest.raises(ValueError, match="no image is large enough"):
            aptvit.fit_glance(model, images)
