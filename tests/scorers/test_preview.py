from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aptvit
from aptvit.dense import make_detector, make_segmenter
from aptvit.scorers.preview import PreviewScorer
from aptvit.scorers.sizes import relative_channels

Host = Callable[..., Any]


def smaller(images: Tensor) -> Tensor:
    """Half the size, each pixel the mean of four: what patches of twice the side see."""
    return F.avg_pool2d(images, 2)


def spread_inside(places: Tensor) -> Tensor:
    """Variance inside 2x patches, two places to a base patch. (B, K, 2 h, 2 w) -> (B, h // 2, w // 2)"""
    cells = F.unfold(places, 4, stride=4).unflatten(1, (places.shape[1], -1))
    rows = places.shape[2] // 4
    return cells.var(2, correction=0).sum(1).unflatten(1, (rows, -1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_without_a_head_the_last_map_of_the_host_is_what_is_said(make_host: Host, images: Tensor, name: str) -> None:
    # Rotary positions of the smaller picture are half a patch away from those of 2x patches, which only a class token,
    # which has none, would notice.
    free: dict[str, Any] = {"class_token": False, "global_pool": "avg"} if "eva" in name else {}
    host = make_host(name, patch_size=16, dynamic_img_size=True, **free)
    model = aptvit.adapt(host, scorer="preview", keep=0.5)
    ((_, scores),) = model.scores(images)
    (last,) = host.forward_intermediates(smaller(images), indices=1, intermediates_only=True)  # of 8 x 8 patches
    outputs = F.interpolate(relative_channels(last), size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(scores[2], spread_inside(outputs), atol=1e-4, rtol=1e-3)
    assert model.layout(images).keep_ratio == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
def test_a_segmenter_says_its_classes(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=4, dynamic_img_size=True), scorer="preview", keep=0.5)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0).eval()
    ((_, scores),) = model.scores(images)
    uniform = copy.deepcopy(segmenter)
    uniform.backbone.model.keep = 1.0
    logits = uniform.head(uniform.backbone.feature_maps(smaller(images)))
    outputs = F.interpolate(logits.softmax(1), size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(scores[2], spread_inside(outputs), atol=1e-5, rtol=1e-3)
    mine, other = (one.backbone.model.patchifier.scorer for one in (segmenter, uniform))
    assert mine.preview.network is segmenter and other.preview.network is uniform  # a copy asks itself


def test_training_is_left_as_it_was(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=4, dynamic_img_size=True), scorer="preview", keep=0.5)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0).train()
    frozen = next(module for module in segmenter.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    before = copy.deepcopy(segmenter.state_dict())
    in_training = [module.training for module in segmenter.modules()]
    model.layout(images)
    assert [module.training for module in segmenter.modules()] == in_training
    assert model.adapter.vit.training
    for name, value in segmenter.state_dict().items():
        assert torch.equal(value, before[name]), name
    segmenter.losses(images, torch.zeros(len(images), 128, 128, dtype=torch.long)).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("detail", [False, True])
def test_heads_read_both_passes(make_host: Host, images: Tensor, detail: bool) -> None:
    """Fine cells as the second pass has them, coarse ones as the first: the host's own of the smaller picture."""
    host = make_host(depth=4, dynamic_img_size=True)
    model = aptvit.adapt(host, scorer="preview", scales=2, keep=0.5)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0, detail=detail).eval()
    layout = model.layout(images)
    maps = segmenter.backbone.plain_maps(images, layout)
    small = host.forward_intermediates(smaller(images), indices=[0, 1, 2, 3], intermediates_only=True)
    coarse = layout.scale_map > 0
    for mine, expected in zip(maps, small, strict=True):
        large = F.interpolate(expected, scale_factor=2)
        torch.testing.assert_close(mine.movedim(1, -1)[coarse], large.movedim(1, -1)[coarse], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(segmenter(images), segmenter(images, layout))
    detector = make_detector(model, 2, out_channels=16, detail=detail).eval()
    layout = detector.backbone.model.layout(images)
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True, layout=layout)
    assert torch.equal(detector.backbone.plain_maps(images, layout)[0], last)


def test_it_is_learned_with(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=4, dynamic_img_size=True), scorer="preview", keep=0.5)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0).train()
    segmenter.losses(images, torch.zeros(len(images), 128, 128, dtype=torch.long)).sum().backward()
    named = dict(segmenter.named_parameters())
    missing = [name for name, one in named.items() if one.requires_grad and one.grad is None]
    assert all(".norm." in name or ".fc_norm." in name or ".head." in name for name in missing), missing
    model.keep = 1.0
    with torch.no_grad():
        maps = segmenter.eval().backbone.maps(images)
        plain = model.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    assert all(map(torch.equal, maps, plain))


@torch.no_grad()
def test_windows_and_pictures_of_any_size(make_host: Host) -> None:
    host = make_host("eva02_tiny_patch14_224", patch_size=16, class_token=False)
    model = aptvit.adapt(host, scorer="preview", keep=0.6, window_size=4, global_blocks=[1], pad=True)
    pictures = [torch.randn(3, 100, 230), torch.randn(3, 300, 40), torch.randn(3, 16, 16)]
    for layout in (model.layout(pictures), model.layout(pictures[0][None])):
        assert layout.window_packing is not None
        assert 0.5 < layout.keep_ratio < 0.7
    tiny = aptvit.adapt(make_host(dynamic_img_size=True), scorer="preview", thresholds=1.0)
    assert tiny.layout(torch.randn(2, 3, 16, 48)).keep_ratio == 1
    raw = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    ((_, of_raw),) = tiny.scores(raw)
    ((_, of_floats),) = tiny.scores(tiny.patchifier.normalization.normalised(raw))
    torch.testing.assert_close(of_raw[2], of_floats[2])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"window_size": 4, "global_blocks": [1], "pad": True}])
def test_all_that_goes_through_the_blocks_is_counted(make_host: Host, options: dict[str, Any]) -> None:
    model = aptvit.adapt(make_host(dynamic_img_size=True), scorer="preview", keep=0.6, **options)
    pictures = [torch.randn(3, 96, 160), torch.randn(3, 64, 64), torch.randn(3, 16, 16)]
    read: list[int] = []
    model.adapter.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    layout = model.layout(pictures)
    model.forward_intermediates(pictures, indices=1, intermediates_only=True, layout=layout)
    # Prefix tokens go through in both passes, but for a picture too small to be read coarsely.
    large = sum(min(grid) > 1 for grid in layout.grid_sizes)
    assert large == (3 if options else 2)
    patches = sum(read) - (large + len(pictures)) * model.num_prefix_tokens
    assert layout.read_ratio == pytest.approx(patches / sum(rows * cols for rows, cols in layout.grid_sizes))
    assert layout.read_ratio > layout.keep_ratio
    assert aptvit.adapt(make_host(), keep=0.5).layout(torch.randn(2, 3, 224, 224)).read_ratio < 0.6


@torch.no_grad()
def test_it_is_saved_with_the_model(make_host: Host, images: Tensor, tmp_path: Any) -> None:
    import timm

    host = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=128, dynamic_img_size=True)
    model = aptvit.adapt(host, scorer="preview", keep=0.5).eval()
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path).eval()
    assert isinstance(again.patchifier.scorer, PreviewScorer)
    assert torch.equal(again.layout(images).scale_map, model.layout(images).scale_map)
