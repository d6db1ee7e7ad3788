"""Pixels that say where they came from: red is twice their column, green twice their row, blue is full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aptvit.dense.transforms import box_transform, fit, mask_transform, with_boxes, with_mask

HEIGHT, WIDTH, SIDE = 90, 120, 96
FITTED = SIDE / WIDTH  # the scale at which the longer side fits
BOXES = torch.tensor([[30.0, 20, 80, 60], [0, 0, 24, 18], [90, 50, 120, 90]])


def scene() -> Tensor:
    rows, cols = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([2 * cols, 2 * rows, torch.full_like(rows, 255)]).to(torch.uint8)


def part_of_picture(out: Tensor) -> tuple[slice, slice]:
    """Rows and columns that are not filled up; what is filled up is black."""
    inside = out[2] == 255
    assert not out[:, ~inside].any()
    rows, cols = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    part = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(cols[0]), int(cols[-1]) + 1)
    assert inside[part].all() and int(inside.sum()) == len(rows) * len(cols)
    return part


def sides_of_scene(out: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(slope, offset) with which edges in the scene come to edges in ``out``, across and down, by a line through the
    pixels."""
    result = []
    for channel, axis in ((0, 1), (1, 0)):
        part = part_of_picture(out)
        places = np.arange(SIDE)[part[axis]] + 0.5
        source = out[channel].double().numpy()[part].mean(1 - axis) / 2 + 0.5
        middle = slice(1, -1)  # at its border the picture is smoothed with itself only
        result.append(np.polyfit(source[middle], places[middle], 1))
    return result[0], result[1]


def expected_boxes(out: Tensor, boxes: Tensor) -> np.ndarray:
    """(n, 4) where the scene's boxes are in ``out``, cut at its border."""
    (sx, ox), (sy, oy) = sides_of_scene(out)
    corners = boxes.double().numpy()
    across, down = np.sort(sx * corners[:, ::2] + ox, axis=1), np.sort(sy * corners[:, 1::2] + oy, axis=1)
    return np.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], axis=1).clip(0, SIDE)


def test_boxes_and_their_masks_go_with_the_picture() -> None:
    image, labels = scene(), torch.tensor([4, 7, 9])
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    scales, mirrored, lost = [], 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        out, target = box_transform(SIDE)(*with_boxes(image, BOXES, labels, masks))
        expected = expected_boxes(out, BOXES)
        sizes = np.minimum(expected[:, 2] - expected[:, 0], expected[:, 3] - expected[:, 1])
        result = dict(zip(target["labels"].tolist(), zip(target["boxes"], target["masks"], strict=True), strict=True))
        for label, box, size in zip(labels.tolist(), expected, sizes, strict=True):
            if label not in result:
                assert size < 1.5
                lost += 1
                continue
            assert size > 0.5
            got, mask = result[label]
            np.testing.assert_allclose(got, box, atol=1)
            inside = np.zeros((SIDE, SIDE))
            inside[tuple(slice(*np.round(box[start::2]).astype(int)) for start in (1, 0))] = 1
            assert (mask.numpy() != inside).sum() <= 2 * SIDE  # a row or column of pixels
        slope = sides_of_scene(out)[0][0]
        scales.append(abs(slope) / FITTED)
        mirrored += slope < 0
    assert 0.09 < min(scales) < 0.3 and 1.8 < max(scales) < 2.02
    assert 15 < mirrored < 45
    assert lost > 10


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("boxes", [True, False])
def test_scale_and_mirror_are_as_asked_for(boxes: bool, flip: float) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        if boxes:
            out, _ = box_transform(SIDE, (1.0, 1.0), flip)(*with_boxes(scene(), BOXES, torch.arange(3)))
        else:
            out, _ = mask_transform(SIDE, (1.0, 1.0), flip, distort=0)(*with_mask(scene(), torch.ones(HEIGHT, WIDTH)))
        (across, _), (down, _) = sides_of_scene(out)
        assert across == pytest.approx(-FITTED if flip else FITTED, rel=0.01)
        assert down == pytest.approx(FITTED, rel=0.01)


def test_masks_go_with_the_picture_and_what_was_filled_up_is_ignored() -> None:
    """Classes are squares of 30 pixels, so that each pixel's colour tells its class."""
    image = scene()
    classes = image[0] // 2 // 30 + 4 * (image[1] // 2 // 30)
    filled, scales = 0, []
    for seed in range(40):
        torch.manual_seed(seed)
        out, result = mask_transform(SIDE, distort=0)(*with_mask(image, classes.long()))
        part = part_of_picture(out)
        ignored = torch.ones(SIDE, SIDE, dtype=torch.bool)
        ignored[part] = False
        assert torch.equal(result == 255, ignored)
        filled += bool(ignored.any())
        (sx, ox), (sy, oy) = sides_of_scene(out)
        x, y = (((np.arange(SIDE) + 0.5) - offset) / slope for slope, offset in ((sx, ox), (sy, oy)))
        clear = [np.abs((side + 15) % 30 - 15) > 2 for side in (x, y)]  # of the borders of classes
        expected = (x // 30)[None] + 4 * (y // 30)[:, None]
        compared = (~ignored).numpy() & clear[0][None] & clear[1][:, None]
        assert compared.sum() > 500
        np.testing.assert_array_equal(result.numpy()[compared], expected[compared])
        scales.append(abs(sx) / FITTED)
    assert filled > 5
    assert 0.49 < min(scales) < 0.7 and 1.8 < max(scales) < 2.02


def test_colours_change_and_places_do_not() -> None:
    image, mask = scene(), torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 7
    for seed in range(5):
        pairs = []
        for distort in (0.0, 1.0):
            torch.manual_seed(seed)
            pairs.append(mask_transform(SIDE, distort=distort)(*with_mask(image, mask)))
        (plain, expected), (coloured, result) = pairs
        assert torch.equal(result, expected)
        inside = (slice(None), *part_of_picture(plain))
        assert (plain[inside] != coloured[inside]).float().mean() > 0.3


def test_a_picture_without_boxes_is_what_it_is_with_them() -> None:
    image, pictures = scene(), []
    for boxes, labels in ((BOXES, torch.arange(3)), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))):
        torch.manual_seed(3)
        out, target = box_transform(64)(*with_boxes(image, boxes, labels))
        pictures.append(out)
    assert torch.equal(*pictures) and pictures[0].shape == (3, 64, 64)
    assert torch.equal(target["boxes"], torch.zeros(0, 4)) and target["labels"].tolist() == []


@pytest.mark.parametrize(
    ("longer_side", "shrink", "size"),
    [(60, 1.0, (45, 60)), (0, 0.5, (45, 60)), (80, 0.75, (45, 60)), (160, 1.0, (120, 160))],
)
def test_a_picture_at_another_size_is_that_of_pillow(longer_side: int, shrink: float, size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    result = fit(image, longer_side, shrink).permute(1, 2, 0)
    np.testing.assert_allclose(result.numpy().astype(int), np.asarray(expected).astype(int), atol=1)
    assert fit(image, 0) is image
