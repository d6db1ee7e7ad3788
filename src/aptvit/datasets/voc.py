"""Boxes in Pascal VOC's XML files, read by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from aptvit.datasets.boxes import BoxFiles, Objects, collect
from aptvit.datasets.splits import Splits, arrange, folders_in, read_parts, split_of, unwrap
from aptvit.files.images import SUFFIXES
from aptvit.files.regular import read_regular
from aptvit.files.text import printable, read_lines

__all__ = ["find_voc", "is_voc", "list_of_voc", "read_voc", "voc_lists"]

_IMAGES, _ANNOTATIONS = ("jpegimages", "images", "imgs"), ("annotations", "annotation", "xmls", "labels")


def is_voc(folder: Path) -> bool:
    """Whether a folder holds annotations in XML, in itself, in ``Annotations``, or for each split."""
    return _has_xml(folder) or any(split_of(path.name) and _has_xml(path) for path in folders_in(folder))


def _has_xml(folder: Path) -> bool:
    places = [folder, *(path for path in folders_in(folder) if path.name.lower() in _ANNOTATIONS)]
    return any(path.suffix.lower() == ".xml" for place in places for path in place.iterdir())


def voc_lists(folder: Path, task: str) -> dict[Path, str]:
    """List the files of ``ImageSets`` that name the images of a split, for a task.

    Args:
        folder: The dataset.
        task: ``"Main"`` for detection, ``"Segmentation"``; lists for other tasks and of single classes do not count.

    Returns:
        Files with the names of their splits.
    """
    for place in (folder / "ImageSets" / task, folder / "ImageSets"):
        lists = sorted(place.glob("*.txt")) if place.is_dir() else []
        names = {path: path.stem for path in lists if "_" not in path.stem and split_of(path.stem)}
        if names:
            return names
    return {}


def list_of_voc(file: Path) -> list[str]:
    """Read the names of images in a list of Pascal VOC, without endings of files, and without 1, 0 or -1 after them."""
    lines = (line.rsplit(None, 1)[0] if line.endswith((" 1", " 0", " -1")) else line for line in read_lines(file))
    return [name[: -len(ending)] if (ending := Path(name).suffix).lower() in SUFFIXES else name for name in lines]


def find_voc(data: Path) -> Splits[BoxFiles]:
    """Find the splits of a folder in Pascal VOC's form.

    ``Annotations/*.xml`` beside ``JPEGImages`` with lists in ``ImageSets/Main``; or such files in a folder for each
    split.

    Args:
        data: The folder.

    Raises:
        ValueError: If a file is wrong, or several lists or folders are for the same split.
    """
    folder = unwrap(data, is_voc)
    if _has_xml(folder):
        lists = voc_lists(folder, "Main")
        if not lists:
            return Splits(read_voc(folder), None)
        return read_parts(arrange(lists, folder), lambda path: read_voc(folder, path))
    names = {path: path.name for path in folders_in(folder)}
    return read_parts(arrange(names, folder, is_content=_has_xml), read_voc)


def read_voc(folder: Path, names: Path | None = None) -> BoxFiles:
    """Read the annotations of a folder, or those of a list.

    Args:
        folder: The folder, with ``Annotations`` and ``JPEGImages``, or with images beside their XML files.
        names: A file with a name in each line, without endings; by default all annotations.

    Returns:
        The images, with the classes of all objects in the folder.

    Raises:
        ValueError: If the list cannot be read.
    """
    inner = {path.name.lower(): path for path in folders_in(folder)}
    images = next((inner[name] for name in _IMAGES if name in inner), folder)
    annotations = next((inner[name] for name in _ANNOTATIONS if name in inner), folder)
    files = {path.stem: path for path in sorted(annotations.iterdir()) if path.suffix.lower() == ".xml"}
    records, problems = {}, []
    for stem, path in files.items():
        try:
            records[stem] = _record(path)
        except ValueError as error:
            problems.append(str(error))
    classes = sorted({name for _, objects in records.values() for name, _ in objects})
    numbers = {name: number for number, name in enumerate(classes)}
    paths: dict[str, list[Path]] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            paths.setdefault(path.stem, []).append(path)
    stems = list(records) if names is None else list_of_voc(names)
    rows = []
    for stem in dict.fromkeys(stems):
        if stem not in records or len(paths.get(stem, ())) != 1:
            lacking = "no annotation" if stem not in records else f"{len(paths.get(stem, ())) or 'no'} images"
            problems.append(f"{printable(stem)}: {lacking}")
            continue
        size, objects = records[stem]
        row = Objects(paths[stem][0], size)
        problems += [problem for name, box in objects if (problem := row.add(box, numbers[name]))]
        rows.append(row)
    if names is None:
        lonely = [stem for stem in paths if stem not in records]
        if lonely:
            problems.append(f"{len(lonely)} images have no annotation, such as {printable(lonely[0])}")
    return collect(rows, classes, problems, folder if names is None else names)


def _record(path: Path) -> tuple[tuple[int, int] | None, list[tuple[str, list[float]]]]:
    """Told size, and class names and corners of the boxes in a file, where pixels are counted from 1."""
    try:
        record: Any = VOCDetection.parse_voc_xml(ElementTree.fromstring(read_regular(path))).get("annotation") or {}
        if not isinstance(record, dict):
            raise ValueError("it has no objects and no size")
        size = record.get("size") or {}
        frame = int(float(size.get("width") or 0)), int(float(size.get("height") or 0))
        objects = [_box(entry) for entry in _entries(record.get("object"))]
        return (frame if min(frame) > 0 else None), objects
    except Exception as error:  # trees of other forms raise errors of many types
        reason = f"no {error}" if isinstance(error, KeyError) else str(getattr(error, "strerror", None) or error)
        raise ValueError(f"{printable(path)} is no annotation in Pascal VOC's form: {reason}") from None


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _box(entry: dict[str, Any]) -> tuple[str, list[float]]:
    box = entry["bndbox"]
    left, top, right, bottom = (float(box[side] or "nan") for side in ("xmin", "ymin", "xmax", "ymax"))
    if not isinstance(entry["name"], str):
        raise ValueError("an object has no name")
    return entry["name"], [left - 1, top - 1, right, bottom]
