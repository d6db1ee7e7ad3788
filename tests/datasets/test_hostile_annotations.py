"""Annotations that ask for more than there is: refused by name, and the images beside them are read."""

from __future__ import annotations

import json
import os
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aptvit.datasets.find_boxes import find_boxes
from aptvit.datasets.labelled import labels_of
from aptvit.datasets.shards import read_shards
from aptvit.files.images import ImageError

SIZE = (60, 44)


def coco(folder: Path, **values: Any) -> Path:
    """Two images with a box each; the values are of the first annotation, and ``frame`` of both images."""
    width, height = values.pop("frame", SIZE)
    for name in "ab":
        Image.new("RGB", SIZE).save(folder / f"{name}.png")
    images = [{"id": i, "file_name": f"{name}.png", "width": width, "height": height} for i, name in enumerate("ab", 1)]
    outline = [[5.0, 5.0, 40.0, 5.0, 40.0, 40.0]]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 30, 30], "segmentation": outline} for i in (1, 2)
    ]
    boxes[0].update(values)
    record = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "boxes.json").write_text(json.dumps(record))
    return folder / "boxes.json"


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ({"size": [44, 60], "counts": [10**11]}, "run lengths of 100000000000 pixels"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "an outline is of 1000000x1000000"),
        ({"size": [44, 60], "counts": "PPPPPPPPPP"}, "neither polygons nor run lengths"),
        ([[0.0, 0.0, 1e9, 1e9, 5.0, 5.0]], r"an outline is 2e\+09 pixels long"),
        ([[0.0, 0.0, 1e300, 1e300, 5.0, -1e300]], "pixels long"),
        ([[float("nan")] * 6], "an outline is nan pixels long"),
    ],
    ids=["run lengths", "size", "text", "long", "endless", "nan"],
)
def test_outlines_without_end(outline: Any, message: str, tmp_path: Path) -> None:
    files = find_boxes(coco(tmp_path, segmentation=outline))[0]
    with pytest.raises(ImageError, match=message):
        files.masks(0, *SIZE)
    assert files.masks(1, *SIZE).sum() > 0


def test_a_frame_that_is_too_large(tmp_path: Path) -> None:
    files = find_boxes(coco(tmp_path, frame=(600_000, 440_000)))[0]
    with pytest.raises(ImageError, match="600000x440000 pixels, more than 50,000,000"):
        files.masks(0, *SIZE, crowds=True)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.png", "/dev/zero", "../../../etc/shadow/x"])
def test_names_that_are_no_files(name: str, tmp_path: Path) -> None:
    file = coco(tmp_path)
    record = json.loads(file.read_text())
    record["images"][0]["file_name"] = name
    file.write_text(json.dumps(record))
    files = find_boxes(file)[0]
    assert len(files) == 1 and any("no such image" in problem and "\n" not in problem for problem in files.problems)
    table = tmp_path / "labels.csv"
    table.write_text(f"file,class_index\n{name}\n")
    with pytest.raises(ValueError, match=r"labels\.csv"):
        labels_of(table, [tmp_path / "a.png"], 2)


def test_an_annotation_that_is_a_pipe(tmp_path: Path) -> None:
    for name in ("JPEGImages", "Annotations"):
        (tmp_path / name).mkdir()
    Image.new("RGB", SIZE).save(tmp_path / "JPEGImages" / "a.png")
    os.mkfifo(tmp_path / "Annotations" / "a.xml")
    with pytest.raises(ValueError, match=r"a\.xml is no annotation .* not a regular file"):
        find_boxes(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "<a>" * 5000 + "</a>" * 5000,
        "<annotation><object><name><b>x</b></name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        "</bndbox></object></annotation>",
        "<annotation><object><bndbox/></object></annotation>",
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><object><name>&x;</name></object></annotation>",
    ],
    ids=["nested", "name of elements", "no box", "entity of a file"],
)
def test_trees_of_other_forms(text: str, tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.xml is no annotation") as refused:
        find_boxes(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("label", [b"9" * 18, b"9" * 5000, b"1000000"])
def test_labels_of_shards_are_bounded(label: bytes, tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", SIZE).save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a.png", buffer.getvalue()), ("a.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    with pytest.raises(ValueError, match=r"a\.cls is no label: \d+ is above 1,000,000"):
        read_shards(str(tmp_path / "a.tar"))
