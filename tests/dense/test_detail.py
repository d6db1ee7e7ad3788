"""What refines maps where patches are coarse: beside a formula in numpy, and learning what a uniform network sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aptvit.dense import CellDetail, DetectionBackbone, TransformersBackbone
from aptvit.training.objectives import map_losses
from aptvit.training.tasks.dense import MapTeacher


def blurred(maps: np.ndarray, step: int) -> np.ndarray:
    """(B, D, h, w) by 1 2 1 both ways, taps ``step`` cells apart, edges repeated."""
    for axis in (2, 3):
        width = [(step, step) if one == axis else (0, 0) for one in range(4)]
        wide = np.pad(maps, width, mode="edge")
        length = maps.shape[axis]
        parts = [np.take(wide, range(first, first + length), axis) for first in (0, step, 2 * step)]
        maps = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return maps


def test_it_begins_as_a_blur_of_coarse_cells(make_model: Callable[..., Any], images: Tensor) -> None:
    model = make_model(thresholds=(6.5, 6.5))
    layout = model.layout(images)
    (maps,) = model.forward_intermediates(images, 1, intermediates_only=True, layout=layout)
    scale = layout.scale_map.numpy()[:, None]
    assert set(np.unique(scale)) == {0, 1, 2}
    with torch.no_grad():
        result = CellDetail(model)(maps, images, layout).numpy()
    expected = maps.detach().numpy()
    for step in (2, 1):
        expected = np.where(scale >= step, blurred(expected, step), expected)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    same = np.broadcast_to(scale == 0, result.shape)
    assert (result[same] == maps.detach().numpy()[same]).all()


@torch.no_grad()
def test_pictures_are_filled_up_as_the_model_fills_them(make_model: Callable[..., Any], images: Tensor) -> None:
    """Maps are those of pictures that were filled up with zeros before, down to the pixels that details are made of."""
    backbone = TransformersBackbone(make_model(thresholds=(6.5, 6.5), pad=True), [3], detail=True)
    torch.nn.init.normal_(backbone.cell_detail[0].out.weight)
    part = images[:, :, :100, :90]
    whole = torch.zeros_like(images)  # of two windows, 64 pixels each
    whole[:, :, :100, :90] = part
    (expected,) = backbone.feature_maps(whole)
    (maps,) = backbone.feature_maps(part)
    torch.testing.assert_close(maps, expected)
    layout = backbone.model.layout(part)
    (plain,) = backbone.plain_maps(part, layout)
    coarse = (layout.scale_map > 0)[:, None].expand_as(plain)
    assert torch.equal(maps[~coarse], plain[~coarse]) and (maps[coarse] != plain[coarse]).float().mean() > 0.99


def test_with_nothing_merged_it_does_nothing(make_model: Callable[..., Any], images: Tensor) -> None:
    model = make_model(thresholds=(-1.0, -1.0))
    plain, refined = (TransformersBackbone(model, [1, 3], detail=detail) for detail in (False, True))
    for detail in refined.cell_detail:
        torch.nn.init.normal_(detail.out.weight)
    with torch.no_grad():
        for actual, expected in zip(refined.feature_maps(images), plain.feature_maps(images), strict=True):
            assert torch.equal(actual, expected)


def test_losses_of_maps_are_relative_and_of_each_image() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(3, 5, 4, 6)) * np.array([1e-9, 1, 2, 10, 100]).reshape(1, 5, 1, 1)
    guess = target + rng.normal(size=target.shape)
    spread = target.var((2, 3), ddof=1, keepdims=True)
    spread = np.maximum(spread, 0.01 * spread.mean(1, keepdims=True))
    expected = ((guess - target) ** 2 / spread).mean((1, 2, 3))
    result = map_losses([torch.tensor(guess)] * 2, [torch.tensor(target)] * 2)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)
    assert torch.equal(map_losses([torch.tensor(guess[:1])], [torch.tensor(target[:1])]), result[:1])


def test_it_learns_what_the_uniform_network_sees(make_model: Callable[..., Any], images: Tensor) -> None:
    """With the backbone frozen, maps at coarse cells come much closer."""
    torch.manual_seed(0)
    backbone = DetectionBackbone(make_model(thresholds=(6.5, 6.5)), out_channels=32)
    teacher = MapTeacher(backbone)
    assert teacher.backbone.model.layout(images).keep_ratio == 1.0
    layout = backbone.model.layout(images)
    assert layout.keep_ratio < 0.9 and backbone.model.thresholds == (6.5, 6.5)
    expected = teacher(images)
    backbone.model.requires_grad_(False)
    optimizer = torch.optim.Adam(backbone.cell_detail.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = map_losses(backbone.maps(images, layout), expected).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_rows_have_no_detail(make_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="no neck and no detail"):
        TransformersBackbone(make_model(thresholds=(6.5,)), [0], sequence=True, detail=True)
