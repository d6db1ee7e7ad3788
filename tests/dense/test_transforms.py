from __future__ import annotations

import torch
from torch import Tensor

from aptvit.dense.transforms import box_transform, mask_transform, with_boxes, with_mask


def scene() -> tuple[Tensor, Tensor]:
    """A dark picture with a bright rectangle, and its box."""
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    image[:, 20:60, 30:80] = 255
    return image, torch.tensor([[30.0, 20, 80, 60]])


def test_boxes_go_with_the_picture() -> None:
    image, boxes = scene()
    kept = 0
    for seed in range(30):
        torch.manual_seed(seed)
        out, target = box_transform(96)(*with_boxes(image, boxes, torch.tensor([4])))
        assert out.shape == (3, 96, 96) and len(target["boxes"]) == len(target["labels"])
        bright = (out[0] > 127).nonzero()
        if not len(target["boxes"]):
            continue
        kept += 1
        (x1, y1, x2, y2) = target["boxes"][0].tolist()
        assert target["labels"].tolist() == [4]
        if len(bright):
            (top, left), (bottom, right) = bright.amin(0).tolist(), bright.amax(0).tolist()
            assert abs(x1 - left) <= 1.5 and abs(y1 - top) <= 1.5
            assert abs(x2 - right - 1) <= 1.5 and abs(y2 - bottom - 1) <= 1.5
    assert kept > 10


def test_masks_go_with_the_picture_and_what_was_filled_up_is_ignored() -> None:
    image, _ = scene()
    mask = (image[0] > 0).long()
    filled = 0
    for seed in range(20):
        torch.manual_seed(seed)
        out, found = mask_transform(96, distort=0)(*with_mask(image, mask))
        assert out.shape == (3, 96, 96) and found.shape == (96, 96)
        assert set(found.unique().tolist()) <= {0, 1, 255}
        filled += int((found == 255).any())
        inside = found != 255
        assert (((out[0] > 127) == (found == 1))[inside]).float().mean() > 0.97
        assert (out[:, ~inside] == 0).all()
    assert filled > 3


def test_no_box_is_no_problem() -> None:
    image, _ = scene()
    none = with_boxes(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    out, target = box_transform(64)(*none)
    assert out.shape == (3, 64, 64) and target["boxes"].shape == (0, 4)
