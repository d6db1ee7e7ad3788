"""Boxes and masks of the stored image are those of the upright one, for every EXIF orientation and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aptvit.datasets.placement import Placement, place
from aptvit.dense import find_boxes, find_masks
from aptvit.files.images import ImageError, open_image, turn_of

WIDTH, HEIGHT = 60, 36
BOX = (12, 6, 24, 12)


def scene() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return pixels


def save(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_boxes_and_masks_are_turned_as_pillow_turns_images(tmp_path: Path, orientation: int, scale: int) -> None:
    save(tmp_path / "a.png", np.kron(scene(), np.ones((scale, scale, 1), np.uint8)), orientation)
    image = open_image(tmp_path / "a.png")
    placement = Placement((WIDTH, HEIGHT), image.size, turn_of(tmp_path / "a.png"))
    (box,) = placement.boxes(torch.tensor([BOX], dtype=torch.float32)).int().tolist()
    bright = np.asarray(image)[..., 0] > 0
    rows, cols = np.nonzero(bright)
    assert box == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
    mask = placement.mask((scene()[..., 0] > 0).astype(np.int64) * 300)
    assert mask.dtype == np.int64 and np.array_equal(mask == 300, bright)


def coco(folder: Path, size: dict[str, int], box: tuple[int, ...] = BOX) -> Path:
    x1, y1, x2, y2 = box
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    record = {
        "images": [{"id": 1, "file_name": "a.png", **size}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [annotation],
    }
    (folder / "a.json").write_text(json.dumps(record))
    return folder


def voc(folder: Path, size: dict[str, int], box: tuple[int, ...] = BOX) -> Path:
    x1, y1, x2, y2 = box
    sides = "".join(f"<{name}>{value}</{name}>" for name, value in size.items())
    corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    (folder / "a.xml").write_text(
        f"<annotation><size>{sides}</size><object><name>x</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    return folder


def masks(folder: Path, size: dict[str, int], box: tuple[int, ...] = BOX) -> Path:
    for name in ("images", "masks"):
        (folder / name).mkdir()
    (folder / "a.png").rename(folder / "images" / "a.png")
    mask = np.zeros((size["height"], size["width"]), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    return folder


def brightness(write: Any, folder: Path, size: dict[str, int], box: tuple[int, ...] = BOX) -> float:
    """Mean brightness inside the annotation, and darkness outside, of the image as it is read."""
    write(folder, size, box)
    if write is masks:
        image, mask = find_masks(folder)[0].load(0)
        inside = mask.numpy() == 1
    else:
        image, boxes, _ = find_boxes(folder)[0].load(0)
        inside = np.zeros((image.height, image.width), bool)
        x1, y1, x2, y2 = boxes[0].round().int().tolist()
        inside[y1:y2, x1:x2] = True
    pixels = np.asarray(image)[..., 0].astype(float)
    return float(min(pixels[inside].mean(), 255 - pixels[~inside].mean()))


WRITERS = [coco, voc, masks]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_what_is_told_for_the_stored_file_is_turned(tmp_path: Path, write: Any, orientation: int) -> None:
    save(tmp_path / "a.png", scene(), orientation)
    assert brightness(write, tmp_path, {"width": WIDTH, "height": HEIGHT}) > 250


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_told_for_the_upright_image_stays(tmp_path: Path, write: Any) -> None:
    save(tmp_path / "a.png", scene(), 6)  # clockwise: x, y -> height - y, x
    turned = (HEIGHT - BOX[3], BOX[0], HEIGHT - BOX[1], BOX[2])
    assert brightness(write, tmp_path, {"width": HEIGHT, "height": WIDTH}, turned) > 250


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_told_for_another_size_is_scaled(tmp_path: Path, write: Any) -> None:
    save(tmp_path / "a.png", np.kron(scene(), np.ones((2, 2, 1), np.uint8)), 1)
    assert brightness(write, tmp_path, {"width": WIDTH, "height": HEIGHT}) > 250


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("size", "orientation"),
    [
        ({"width": WIDTH, "height": HEIGHT + 9}, 1),  # cropped or squashed
        ({"width": HEIGHT, "height": WIDTH}, 1),  # turned one way or the other
        ({"width": WIDTH, "height": HEIGHT}, 3),  # upside down, or not
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, write: Any, size: dict[str, int], orientation: int) -> None:
    save(tmp_path / "a.png", scene(), orientation)
    with pytest.raises(ImageError, match=rf"a\.png: .* {size['width']}x{size['height']} pixels") as caught:
        brightness(write, tmp_path, size)
    assert f"{WIDTH}x{HEIGHT}" in str(caught.value)


def test_squares_that_are_turned_are_refused() -> None:
    with pytest.raises(ImageError, match="tells viewers to turn"):
        place("a.png", (50, 50), (50, 50), Image.Transpose.ROTATE_90)
    assert place("a.png", (50, 50), (50, 50), None).is_identity
    assert place("a.png", None, (50, 40), Image.Transpose.ROTATE_90).is_identity


def test_sizes_may_be_rounded() -> None:
    assert place("a", (1999, 1333), (640, 427), None).boxes(torch.tensor([[0.0, 0, 1999, 1333]])).tolist() == [
        [0, 0, 640, 427]
    ]
    with pytest.raises(ImageError, match="width and height"):
        place("a", (0, 10), (640, 427), None)
