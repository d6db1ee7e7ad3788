"""Hostile annotations: COCO's JSON, Pascal VOC's XML, YOLO's text and YAML, tables of labels, masks and colours."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..fixtures import coco_record
from .case import Case, Payload
from .images import encode, flat_png, names_and_places, png_of, zeros

__all__ = ["annotations"]


def annotations(seed: int) -> Iterator[Case]:
    """All hostile annotations."""
    yield from _coco(random.Random(seed))
    yield from _voc()
    yield from _yolo()
    yield from _labels()
    yield from _masks()


def _written(content: bytes) -> Callable[[Path, Payload], Any]:
    return lambda path, payload: path.write_bytes(content)


def _coco(rng: random.Random) -> Iterator[Case]:
    def case(name: str, content: Any, must_tell: bool = False) -> Case:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        return Case(f"coco {name}", "coco", "hostile.json", _written(text), must_tell)

    for name, text in (("empty", b""), ("cut", json.dumps(coco_record()).encode()[:-40]), ("nested", b"[" * 90_000)):
        yield case(name, text, must_tell=True)
    for key in ("images", "annotations", "categories"):
        for value in (None, 5, "x", {}, [5], [None], [{}]):
            yield case(f"{key} {json.dumps(value)}", {**coco_record(), key: value})
    entries = {
        "images": {
            "file_name": ("../../../../etc/passwd", "/dev/zero", "x" * 5000, "a\0b", 5, None, "", ".", "good0.png/x"),
            "width": (10**12, -5, "x", 1e400, float("nan")),
            "height": (10**12, 0, [1]),
            "id": ([1], None, {}),
        },
        "annotations": {
            "bbox": (
                [],
                [1, 2],
                "abcd",
                [float("nan")] * 4,
                [0, 0, 1e300, 1e300],
                [5, 5, -9, -9],
                None,
                [10**400, 1, 1, 1],
            ),
            "category_id": (99, [1], None, "cat"),
            "area": (float("nan"), "x", -1, 10**400),
            "iscrowd": ("x", [1]),
            "image_id": (99, [1], None),
            "segmentation": (
                5,
                "x",
                [[1, 2, 3]],
                [[float("nan")] * 6],
                [[0, 0, 1e9, 1e9, 5, 5]],
                [[1e300, 0, 1, 1, 2, -1e300]],
                [["a"] * 6],
                {"size": [44, 60], "counts": [10**11]},
                {"size": [44, 60], "counts": [-5, 2645]},
                {"size": [10**6, 10**6], "counts": [10**12]},
                {"size": [44, 60], "counts": "PPPPPPPPPPPPPPP"},
                {"size": [44, 60], "counts": "\x00\xff"},
                {"size": "x", "counts": 5},
                {"counts": []},
                {},
            ),
        },
        "categories": {"name": (5, None, [1], "a\nb", "x" * 100_000), "id": ([1], None, "x")},
    }
    for key, fields in entries.items():
        for field, values in fields.items():
            for number, value in enumerate(values):
                record = coco_record()
                record[key][0][field] = value
                yield case(f"{field} of {key} {number}", record)
    record = coco_record()
    for entry in record["images"]:
        entry.update(width=600_000, height=440_000)
    yield case("of images of 600000 x 440000", record)
    yield case(
        "of 40000 categories", {**coco_record(), "categories": [{"id": i, "name": f"c{i}"} for i in range(40_000)]}
    )
    yield Case("coco pipe", "coco", "hostile.json", _pipe)


def _pipe(path: Path, payload: Payload) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _voc() -> Iterator[Case]:
    def case(name: str, text: str | bytes, must_tell: bool = True) -> Case:
        content = text if isinstance(text, bytes) else text.encode()
        return Case(f"voc {name}", "voc", "hostile.xml", _written(content), must_tell)

    laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(12))
    yield case("of a billion laughs", f'<!DOCTYPE a [<!ENTITY l0 "ha">{laughs}]><annotation>&l12;</annotation>')
    yield case(
        "with an entity of a file",
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><object><name>&x;</name></object></annotation>',
    )
    yield case("empty", "")
    yield case("cut", "<annotation><object>")
    yield case("of noise", bytes(range(256)))
    yield case("nested", "<a>" * 50_000 + "</a>" * 50_000)
    yield case("of nothing", "<annotation/>", must_tell=False)
    yield case("of another root", "<html><body/></html>", must_tell=False)
    box = "<bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    for value in ("nan", "-1e300", "1e400", "x", "", "9" * 400, "<b>5</b>"):
        text = f"<annotation><object><name>cat</name>{box.format(value)}</object></annotation>"
        yield case(f"with xmin {value[:10]!r}", text, must_tell=value not in ("-1e300",))
    for name in ("<name><b>x</b></name>", "", "<name></name>", "<name>a</name><name>b</name>"):
        yield case(f"with the name {name!r}", f"<annotation><object>{name}{box.format(5)}</object></annotation>")
    for width, height in (("1e12", "1e12"), ("-5", "5"), ("nan", "5"), ("x", "y"), ("60000000", "44000000")):
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation>{size}<object><name>cat</name>{box.format(5)}</object></annotation>"
        yield case(f"of {width} x {height}", text, must_tell=False)
    yield Case("voc pipe", "voc", "hostile.xml", _pipe)


def _yolo() -> Iterator[Case]:
    lines = ("", "x", "0", "0 1", "0 nan nan nan nan", "0 1e400 0 0 0", "-1 .5 .5 .1 .1", "99 .5 .5 .1 .1", "0 5 5 5 5")
    lines += (
        "0 " + "0.5 " * 200_001,
        "9" * 5000 + " .5 .5 .1 .1",
        "0 .5 .5 -.1 -.1",
        "0 .1 .1 .2",
        "\x00" * 9,
        "0 a b c d",
    )
    for number, line in enumerate(lines):
        yield Case(f"yolo labels {number}", "yolo", "labels/hostile.txt", _written(line.encode()), must_tell=False)
    texts = ("", "[", "names: 5\ntrain: images", "names: [a, [b]]\ntrain: images", "names: {0: a, 5: b}\ntrain: images")
    texts += (
        "names: [a]",
        "names: [a]\ntrain: /dev/zero",
        "names: [a]\ntrain: " + "x" * 5000,
        "names: [a]\ntrain: {a: b}",
    )
    texts += (
        "names: [a]\ntrain: images\nkpt_shape: [1000000000, 1000000000]",
        "names: [a]\ntrain: images\nkpt_shape: x",
    )
    texts += ("names: [a]\ntrain: ../../../../../../etc", "!!python/object/apply:os.system ['touch canary']")
    texts += ("a: &a [x,x,x]\nb: &b [*a,*a]\nnames: [*b,*b]\ntrain: images", "names: [a]\ntrain: images\npath: 5")
    for number, text in enumerate(texts):
        yield Case(f"yolo yaml {number}", "yolo", "hostile.yaml", _written(text.encode()), must_tell=False)
    yield Case("yolo labels pipe", "yolo", "labels/hostile.txt", _pipe, must_tell=False)
    yield Case("yolo yaml pipe", "yolo", "hostile.yaml", _pipe)


def _labels() -> Iterator[Case]:
    rows = ("good0.png,0\n", "good0.png,-1\n", "good0.png,99999\n", "good0.png,x\n", "good0.png,²\n", ",0\n", "x\n")
    rows += (
        "../../../etc/passwd,0\n",
        "/dev/zero,0\n",
        "x" * 5000 + ",0\n",
        "a\0b,0\n",
        '"good0.png\n,0\n',
        "good0.png,1e3\n",
    )
    rows += ("good0.png," + "9" * 5000 + "\n", "good0.png,0\ngood0.png,1\n", '"' + "x" * 200_000 + '",0\n')
    for number, row in enumerate(rows):
        text = f"file,class_index\n{row}"
        yield Case(f"labels {number}", "labels", "hostile.csv", _written(text.encode()), must_tell=False)
    for name, content in (("empty", b""), ("of noise", bytes(range(256))), ("of other columns", b"a,b\n1,2\n")):
        yield Case(f"labels {name}", "labels", "hostile.csv", _written(content))
    for case in names_and_places(b"", "labels", "csv"):
        if "named" not in case.name and "folder" not in case.name:
            yield Case(f"labels {case.name}", "labels", case.file, case.make)


def _masks() -> Iterator[Case]:
    def array(values: Any, kind: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind)
        return buffer.getvalue()

    shape = (44, 60)
    masks: dict[str, tuple[str, Callable[[], bytes]]] = {
        "empty": ("png", lambda: b""),
        "cut": ("png", lambda: encode("png")[:60]),
        "of colours": ("png", lambda: encode("png")),
        "of noise": ("png", lambda: bytes(range(256))),
        "of JPEG": ("jpg", lambda: encode("jpg")),
        "of 20000 x 20000": ("png", lambda: flat_png(20000, 20000)),
        "of 12000 x 8800": ("png", lambda: flat_png(12000, 8800, 8)),
        "of 65535 x 65535 in its header": ("png", lambda: png_of(65535, 65535, zeros(99), 8)),
        "of another shape": ("png", lambda: flat_png(17, 91, 8)),
        "of 2^31 classes": ("tif", lambda: array(np.full(shape, 2**31 - 1, np.int32), "TIFF")),
        "of negative classes": ("tif", lambda: array(np.full(shape, -5, np.int32), "TIFF")),
        "of NaN": ("tif", lambda: array(np.full(shape, np.nan, np.float32), "TIFF")),
        "of 1e30": ("tif", lambda: array(np.full(shape, 1e30, np.float32), "TIFF")),
        "of fractions": ("tif", lambda: array(np.full(shape, 0.5, np.float32), "TIFF")),
        "with transparency": ("png", lambda: array(np.zeros((*shape, 4), np.uint8))),
        "of class 200": ("png", lambda: array(np.full(shape, 200, np.uint8))),
    }
    for name, (suffix, content) in masks.items():

        def make(path: Path, payload: Payload, content: Callable[[], bytes] = content) -> None:
            path.write_bytes(content())

        yield Case(f"mask {name}", "mask", f"masks/hostile.{suffix}", make, must_tell=False)
    for case in names_and_places(b"", "mask", "png"):
        if "named" not in case.name:
            yield Case(f"mask {case.name}", "mask", "masks/hostile.png", case.make, must_tell=False)
    for number, text in enumerate(
        ("", "x", "name,r,g,b\na,1,2\n", "name,r,g,b\na,999,0,0\n", "name,r,g,b\na,0,0,0\nb,0,0,0\n")
    ):
        yield Case(f"colours {number}", "mask", "class_dict.csv", _written(text.encode()), must_tell=False)
    yield Case(
        "colours of a field too long",
        "mask",
        "class_dict.csv",
        _written(b'name,r,g,b\n"' + b"x" * 200_000 + b'"'),
        False,
    )
    yield Case("names of classes pipe", "mask", "classes.txt", _pipe, must_tell=False)
