"""Images with boxes and masks as trainings read them: large ones are reduced, with their objects in the same places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aptvit.datasets.boxes import BoxFiles
from aptvit.dense import find_boxes, find_masks
from aptvit.measuring.memory import peak_memory
from aptvit.training import DetectionRecipe, SegmentationRecipe
from aptvit.training.tasks.datasets import BoxDataset, MaskDataset

WIDTH, HEIGHT = 1200, 800
BOX = (300, 200, 660, 500)  # left, top, right, bottom


def picture() -> np.ndarray:
    """(H, W) uint8: bright where the object is."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return pixels


def boxes_in(folder: Path, copies: int = 1) -> BoxFiles:
    """An image with an object, or several of them in the same place, in COCO's form."""
    left, top, right, bottom = BOX
    Image.fromarray(picture()).convert("RGB").save(folder / "a.png")
    outline = [[left, top, right, top, right, bottom, left, bottom]]
    box = {"image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top], "segmentation": outline}
    record = {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [{"id": i, "area": 1, **box} for i in range(copies)],
        "categories": [{"id": 1, "name": "object"}],
    }
    (folder / "a.json").write_text(json.dumps(record))
    return find_boxes(folder)[0]


def test_boxes_and_masks_of_a_large_image(tmp_path: Path) -> None:
    recipe = DetectionRecipe(size=128, jitter=(1.0, 1.0), flip=0.0)
    image, target, valid, *_ = BoxDataset(boxes_in(tmp_path), recipe, masks=True)[0]
    assert valid and image.shape == (3, 128, 128)
    (mask,), (box,) = target["masks"], target["boxes"].tolist()
    bright = image[0] > 127
    rows, cols = bright.nonzero().unbind(1)  # the place in the square is random
    corners = [int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1]
    assert box == pytest.approx(corners, abs=1.5) and box[2] - box[0] == pytest.approx(360 * 128 / WIDTH, abs=0.2)
    assert (mask.bool() == bright).float().mean() > 0.98


def test_an_image_that_is_small_enough_stays(tmp_path: Path) -> None:
    files = boxes_in(tmp_path)
    dataset = BoxDataset(files, DetectionRecipe(size=WIDTH, jitter=(1.0, 1.0)), masks=True)
    image, target = dataset._read(0)
    assert image.shape == (3, HEIGHT, WIDTH) and torch.equal(target["boxes"], torch.tensor([BOX]).float())
    assert torch.equal(target["masks"], files.masks(0, WIDTH, HEIGHT))


def test_classes_of_the_pixels_of_a_large_image(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(picture()).convert("RGB").save(tmp_path / "images" / "a.png")
    Image.fromarray(picture() // 255).save(tmp_path / "masks" / "a.png")
    recipe = SegmentationRecipe(size=128, jitter=(1.0, 1.0), flip=0.0, distort=0.0)
    image, classes, *_ = MaskDataset(find_masks(tmp_path)[0], recipe)[0]
    content = classes != 255  # the rest is padding
    assert (classes[content].bool() == (image[0] > 127)[content]).float().mean() > 0.98
    assert 0 < int((classes == 1).sum()) < content.sum()


@pytest.mark.parametrize("copies", [200])
def test_hundreds_of_masks_are_as_small_as_the_crop(tmp_path: Path, copies: int) -> None:
    """At the size of the image they would take 200 bytes for each of its pixels."""
    dataset = BoxDataset(boxes_in(tmp_path, copies), DetectionRecipe(size=128), masks=True)
    dataset[0]
    assert peak_memory(lambda: dataset[0], "cpu") < 60 * WIDTH * HEIGHT
