from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aptvit.dense import find_boxes, find_masks
from aptvit.files.images import ImageError


def picture(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return path


def mask(path: Path, numbers: np.ndarray, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = Image.fromarray(numbers.astype(np.uint8))
    if palette:
        file.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    file.save(path)
    return path


def voc(folder: Path, stem: str, objects: list[tuple[str, list[float]]]) -> None:
    rows = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for name, (a, b, c, d) in objects
    )
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{rows}</annotation>")
    picture(folder / "JPEGImages" / f"{stem}.jpg")


def test_pascal_voc(tmp_path: Path) -> None:
    voc(tmp_path, "one", [("dog", [1, 1, 20, 30]), ("cat", [11, 6, 45, 20]), ("cat", [5, 5, 4, 9])])
    voc(tmp_path, "two", [])
    voc(tmp_path, "three", [("cat", [3, 3, 9, 9])])
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("one\ntwo\nnowhere\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("three  1\n")
    train, evaluation = find_boxes(tmp_path)
    assert evaluation is not None and (len(train), len(evaluation)) == (2, 1)
    assert train.classes == evaluation.classes == ["cat", "dog"]
    assert train.boxes[0].tolist() == [[0, 0, 20, 30], [10, 5, 45, 20]]
    assert train.labels[0].tolist() == [1, 0] and train.boxes[1].shape == (0, 4)
    assert {problem.split(":")[0] for problem in train.problems} == {"nowhere", "one.jpg"}
    image, boxes, labels = train.load(0)
    assert image.size == (40, 30) and boxes.tolist() == [[0, 0, 20, 30], [10, 5, 40, 20]]  # cut at the edge
    assert labels.tolist() == [1, 0]
    assert len(train.only([1])) == 1


def test_coco(tmp_path: Path) -> None:
    picture(tmp_path / "train2017" / "a.png")
    picture(tmp_path / "images" / "b.png")
    record = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}, {"id": 4, "file_name": "c.png"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 20]},
            {"id": 2, "image_id": 7, "category_id": 17, "bbox": [1, 2, 0, 20]},
            {"id": 3, "image_id": 7, "category_id": 17, "bbox": [1, 2, 10, 20], "iscrowd": 1},
            {"id": 4, "image_id": 99, "category_id": 17, "bbox": [1, 2, 10, 20]},
        ],
    }
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train2017", "instances_val2017", "captions_train2017"):
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(record if "inst" in name else {}))
    train, evaluation = find_boxes(tmp_path)
    assert evaluation is not None and train.classes == ["cat", "dog"]
    assert [path.name for path in train.paths] == ["a.png", "b.png"]
    assert train.boxes[0].tolist() == [[1, 2, 11, 22]] * 2 and train.labels[0].tolist() == [1, 0]
    assert train.crowd[0].tolist() == [False, True]
    assert train.load(0)[2].tolist() == [1] and train.load_objects(0).labels.tolist() == [1, 0]
    assert len(train.boxes[1]) == 0
    assert len(train.problems) == 4  # captions, another image, no image, no area
    only, none = find_boxes(tmp_path / "annotations" / "instances_train2017.json")
    assert none is None and len(only) == 2


def test_outlines(tmp_path: Path) -> None:
    """Polygons and both kinds of run lengths say the same; the packed one is pycocotools' of this mask."""
    picture(tmp_path / "a.png", 6, 5)
    square = np.zeros((5, 6), dtype=np.uint8)
    square[1:4, 2:5] = 1
    runs = {"counts": [11, 3, 2, 3, 2, 3, 6], "size": [5, 6]}
    outlines = [[[2, 1, 5, 1, 5, 4, 2, 4]], runs, {"counts": ";320004", "size": [5, 6]}]
    record = {
        "images": [{"id": 0, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 0, "category_id": 1, "bbox": [2, 1, 3, 3], "segmentation": one}
            for i, one in enumerate(outlines)
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    files, _ = find_boxes(tmp_path)
    masks = files.only([0]).masks(0, 6, 5)
    assert masks.shape == (3, 5, 6) and masks.dtype == torch.uint8
    for one in masks:
        assert np.array_equal(one.numpy(), square)
    for bad, reason in (({"counts": [3], "size": [5, 6]}, "5x6|6x5"), ("dog", "no polygon of at least three points")):
        record["annotations"][0]["segmentation"] = bad
        (tmp_path / "boxes.json").write_text(json.dumps(record))
        with pytest.raises(ImageError, match=reason):
            find_boxes(tmp_path)[0].masks(0, 6, 5)
    del record["annotations"][0]["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    assert not find_boxes(tmp_path)[0].outlines


def test_folders_without_boxes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_boxes(tmp_path / "nothing")
    with pytest.raises(ValueError, match="in no known format"):
        find_boxes(tmp_path)
    (tmp_path / "annotations.json").write_text("[]")
    with pytest.raises(ValueError, match="is not in COCO's form"):
        find_boxes(tmp_path)
    voc(tmp_path / "voc", "one", [])
    with pytest.raises(ValueError, match="no boxes to train on"):
        find_boxes(tmp_path / "voc")
    (tmp_path / "voc" / "Annotations" / "one.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"one\.xml is no annotation"):
        find_boxes(tmp_path / "voc")


NUMBERS = np.tile(np.array([0, 1, 2, 255]), (30, 10))


@pytest.mark.parametrize(
    "pictures, masks",
    [
        ("images/training", "annotations/training"),
        ("train", "trainannot"),
        ("train/images", "train/masks"),
        ("images", "masks"),
    ],
)
@pytest.mark.parametrize("palette", [False, True])
def test_folders_of_masks(tmp_path: Path, pictures: str, masks: str, palette: bool) -> None:
    for name in ("a", "b"):
        picture(tmp_path / pictures / f"{name}.jpg")
        mask(tmp_path / masks / f"{name}.png", NUMBERS, palette)
    picture(tmp_path / pictures / "without.jpg")
    train, evaluation = find_masks(tmp_path)
    assert evaluation is None and len(train) == 2 and train.num_classes == 3
    image, classes = train.load(1)
    assert image.size == (40, 30)
    assert torch.equal(classes, torch.from_numpy(NUMBERS))


def test_splits_share_their_classes_and_ade20k_counts_from_one(tmp_path: Path) -> None:
    for split, numbers in (("training", NUMBERS), ("validation", NUMBERS[:, :4].repeat(10, 1) * 0 + 1)):
        picture(tmp_path / "images" / split / "a.jpg")
        mask(tmp_path / "annotations" / split / "a.png", numbers)
    train, evaluation = find_masks(tmp_path, subtract=1)
    assert evaluation is not None and train.num_classes == evaluation.num_classes == 2
    assert train.load(0)[1][0, :4].tolist() == [255, 0, 1, 255]
    assert evaluation.load(0)[1].unique().tolist() == [0]
    train, _ = find_masks(tmp_path, ignore=[2, 255])
    assert train.num_classes == 2 and train.load(0)[1][0, :4].tolist() == [0, 1, 255, 255]


def test_classes_can_have_names(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", NUMBERS)
    assert find_masks(tmp_path)[0].classes == ["0", "1", "2"]
    (tmp_path / "classes.txt").write_text("road\nsky\n\ncar\nnever seen\n")
    result, _ = find_masks(tmp_path)
    assert result.num_classes == 4 and result.classes[2] == "car"
    with pytest.raises(ValueError, match="names 4 classes, and there are to be 3"):
        find_masks(tmp_path, num_classes=3)


def test_bad_masks_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    file = mask(tmp_path / "masks" / "a.png", NUMBERS[:20])
    train, _ = find_masks(tmp_path, num_classes=3)
    with pytest.raises(ImageError, match="the mask has 40x20 pixels, the upright image has 40x30"):
        train.load(0)
    mask(file, NUMBERS)
    with pytest.raises(ImageError, match="label 2 is out of range, there are 2 classes"):
        find_masks(tmp_path, num_classes=2)[0].load(0)
    picture(file)
    with pytest.raises(ImageError, match="has colours"):
        train.load(0)
    file.write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"a\.png: cannot identify"):
        train.load(0)
    with pytest.raises(ValueError, match="no images with masks"):
        find_masks(tmp_path / "images")
