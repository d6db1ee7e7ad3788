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
from aptvit.layout import PatchLayout
from aptvit.preview import PreviewScorer
from aptvit.spread import relative_channels

Host = Callable[..., Any]


def smaller(images: Tensor, rows: int, cols: int) -> Tensor:
    return F.interpolate(images, size=(16 * rows, 16 * cols), mode="bilinear", antialias=True)


def spread_inside(places: Tensor, factor: int) -> Tensor:
    """Variance inside patches, two places to a base patch. (B, K, 2 h, 2 w) -> (B, h // factor, w // factor)"""
    cells = F.unfold(places, 2 * factor, stride=2 * factor).unflatten(1, (places.shape[1], -1))
    rows = places.shape[2] // (2 * factor)
    return cells.var(2, correction=0).sum(1).unflatten(1, (rows, -1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_without_a_head_the_last_map_of_the_host_is_what_is_said(make_host: Host, images: Tensor, name: str) -> None:
    host = make_host(name, patch_size=16, dynamic_img_size=True)
    model = aptvit.adapt(host, scorer="preview", scales=3, keep=0.5)
    ((_, scores),) = model.scores(images)
    (last,) = host.forward_intermediates(smaller(images, 4, 4), indices=1, intermediates_only=True)  # of 8 x 8 patches
    said = F.interpolate(relative_channels(last), size=(16, 16), mode="bilinear", antialias=True)
    for factor in (2, 4):
        torch.testing.assert_close(scores[factor], spread_inside(said, factor), atol=1e-4, rtol=1e-3)
    assert model.layout(images).keep_ratio == pytest.approx(0.5, abs=0.05)


@torch.no_grad()
def test_a_segmenter_says_its_classes(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=4, dynamic_img_size=True), scorer="preview", keep=0.5)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0).eval()
    ((_, scores),) = model.scores(images)
    uniform = copy.deepcopy(segmenter)
    uniform.backbone.model.keep = 1.0
    logits = uniform.head(uniform.backbone.feature_maps(smaller(images, 4, 4)))
    said = F.interpolate(logits.softmax(1), size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(scores[2], spread_inside(said, 2), atol=1e-5, rtol=1e-3)
    mine, other = (one.backbone.model.patchifier.scorer for one in (segmenter, uniform))
    assert mine.network is segmenter and other.network is uniform  # a copy asks itself


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


def stood_in(images: Tensor, layout: PatchLayout, fine: list[Tensor], host: Any, indices: list[int]) -> list[Tensor]:
    """Maps of 8 x 8 patches, with the host's own of the picture at half the size where patches are coarse."""
    coarse = layout.scale_map[:, None].expand(-1, fine[0].shape[1], -1, -1) > 0
    small = host.forward_intermediates(smaller(images, 4, 4), indices=indices, intermediates_only=True)
    large = [F.interpolate(one, scale_factor=2, mode="bilinear") for one in small]
    return [torch.where(coarse, theirs, mine) for theirs, mine in zip(large, fine, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("scales", [2, 3])
def test_maps_of_the_preview_stand_where_patches_are_coarse(make_host: Host, images: Tensor, scales: int) -> None:
    host = make_host(depth=4, dynamic_img_size=True)
    model = aptvit.adapt(host, scorer="preview", scales=scales, keep=0.5)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0).eval()
    layout = model.layout(images)
    fine = model.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True, layout=layout)
    expected = stood_in(images, layout, fine, host, [0, 1, 2, 3])
    for mine, one in zip(segmenter.backbone.maps(images, layout), expected, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(segmenter(images), segmenter(images, layout))
    detector = make_detector(
        aptvit.adapt(host, scorer="preview", scales=scales, keep=0.5), 2, out_channels=16, detail=False
    )
    layout = detector.backbone.model.layout(images)
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True, layout=layout)
    (expected_last,) = stood_in(images, layout, [last], host, [3])
    torch.testing.assert_close(detector.backbone.maps(images, layout)[0], expected_last, atol=1e-5, rtol=1e-5)


def test_where_nothing_stands_in(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=4, dynamic_img_size=True), scorer="preview", keep=0.5)
    assert model.layout(images).preview == ()  # no head
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=0).train()
    assert len(model.layout(images).preview) == 4
    assert model.layout([images[0], images[1, :, :64]]).preview == ()  # heads read pictures of one size
    # What the smaller picture gave is not learned from, all else is.
    segmenter.losses(images, torch.zeros(len(images), 128, 128, dtype=torch.long)).sum().backward()
    assert all(one.grad is not None for one in (model.blocks[0].mlp.fc1.weight, segmenter.head.classifier.weight))
    layout = model.layout(images)
    with pytest.raises(ValueError, match="4 maps for 1"):
        make_detector(model, 2, out_channels=16, detail=False).backbone.maps(images, layout)
    model.keep = 1.0
    with torch.no_grad():
        maps = segmenter.backbone.maps(images)
        plain = model.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    assert all(map(torch.equal, maps, plain))
    make_segmenter(model, 3, channels=16, auxiliary_channels=0, detail=True)
    model.keep = 0.5
    assert model.layout(images).preview == ()  # details refine coarse patches there
    other = aptvit.adapt(make_host(depth=4, dynamic_img_size=True), scorer="preview", thresholds=1.0)
    make_segmenter(other, 3, channels=16, auxiliary_channels=0)
    other.layout([images[0], images[1, :, :64]])
    assert other.layout(torch.randn(2, 3, 16, 64)).preview == ()  # too small to be looked at, and nothing is left over


@torch.no_grad()
def test_what_stands_in_is_where_it_was_seen(make_host: Host) -> None:
    """Neither odd grids nor the windows that the smaller picture is filled up to shift its maps."""
    host = make_host("eva02_tiny_patch14_224", depth=4, patch_size=16, class_token=False, dynamic_img_size=True)
    options: dict[str, Any] = {"scorer": "preview", "scales": 2, "pad": True}
    windows: dict[str, Any] = {"window_size": 4, "global_blocks": [1]}
    for size, small, more in (((112, 208), (64, 112), {}), ((192, 64), (96, 32), windows)):
        images = torch.randn(1, 3, *size)
        model = aptvit.adapt(host, **options, **more, thresholds=1e9)  # all is coarse that can be
        backbone = make_segmenter(model, 3, channels=16, auxiliary_channels=0).eval().backbone
        half = F.interpolate(images, size=small, mode="bilinear", antialias=True)
        half = F.pad(half, (0, 32, 0, 32)) if more else half
        dense = aptvit.adapt(host, **{**options, **more}, thresholds=-1.0)
        seen = dense.forward_intermediates(half, indices=backbone.indices, intermediates_only=True)
        layout = model.layout(images)
        coarse = (layout.scale_map > 0)[0]
        for mine, theirs in zip(backbone.maps(images), seen, strict=True):
            theirs = theirs[:, :, : small[0] // 16, : small[1] // 16]
            large = F.interpolate(theirs, size=[side // 16 for side in size], mode="bilinear")
            torch.testing.assert_close(mine[0][:, coarse], large[0][:, coarse], atol=1e-4, rtol=1e-4)


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
    ((_, of_floats),) = tiny.scores(tiny.patchifier.normalised(raw))
    torch.testing.assert_close(of_raw[2], of_floats[2])


@torch.no_grad()
def test_it_is_saved_with_the_model(make_host: Host, images: Tensor, tmp_path: Any) -> None:
    import timm

    host = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=128, dynamic_img_size=True)
    model = aptvit.adapt(host, scorer="preview", keep=0.5).eval()
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path).eval()
    assert isinstance(again.patchifier.scorer, PreviewScorer)
    assert torch.equal(again.layout(images).scale_map, model.layout(images).scale_map)
