"""Boxes and outlines in COCO's JSON files, read by faster-coco-eval, a drop-in for COCO's own library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from aptvit.datasets.boxes import BoxFiles, Objects, collect
from aptvit.datasets.splits import Splits, arrange, folders_in, read_parts, split_of, unwrap
from aptvit.files.regular import is_regular
from aptvit.files.text import printable, read_json

__all__ = ["find_coco", "is_coco", "read_coco"]

_OTHER_FILES = re.compile(r"caption|keypoint|panoptic|image_info|stuff", re.IGNORECASE)


def is_coco(folder: Path) -> bool:
    """Whether a folder holds COCO's JSON files, in itself or in ``annotations``, or for each split."""
    return bool(_json_files(folder)) or any(split_of(path.name) and _json_files(path) for path in folders_in(folder))


def _json_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".json"]
    inner = [path for path in folders_in(folder) if path.name.lower() == "annotations"]
    return files + [file for path in inner for file in sorted(path.iterdir()) if file.suffix.lower() == ".json"]


def find_coco(data: Path) -> Splits[BoxFiles]:
    """Find the splits of a folder in COCO's form.

    ``annotations/instances_train*.json`` and ``..._val*.json`` as downloaded, files named after splits in the folder
    itself, a file in a folder for each split, or a single file.

    Args:
        data: The folder, or a file.

    Raises:
        ValueError: If there is no such file, or several for a split.
    """
    if data.is_file():
        return Splits(read_coco(data), None)
    folder = unwrap(data, is_coco)
    files = _json_files(folder)
    names = {file: file.stem for file in files}
    if not files:
        names = {file: path.name for path in folders_in(folder) if split_of(path.name) for file in _json_files(path)}
    left_out = [f"{file.name}: not used, it holds no boxes" for file in names if _OTHER_FILES.search(file.stem)]
    names = {file: name for file, name in names.items() if not _OTHER_FILES.search(file.stem)}
    instances = {file: name for file, name in names.items() if "instances" in file.stem.lower()}
    splits = arrange(instances or names, folder)
    if len(splits.train) != 1:
        raise ValueError(
            f"{folder} has {len(splits.train)} JSON files of boxes: name those of the splits with --train and --val"
        )
    boxes = read_parts(splits, lambda file: read_coco(file, folder))
    return replace(boxes, left_out=(*splits.left_out, *left_out))


def read_coco(file: Path, root: Path | None = None) -> BoxFiles:
    """Read a JSON file of COCO and find its images.

    Args:
        file: The file.
        root: Folder of the dataset, in which images are searched; by default the folder of the file, or the one above
            ``annotations``.

    Returns:
        The images with all boxes, those of crowds included.

    Raises:
        ValueError: If the file is not in COCO's form, or the images of a name are ambiguous.
        ImportError: If faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO
    except ImportError:
        raise ImportError("COCO's files are read by faster-coco-eval: pip install 'aptvit[dense]'") from None
    record = read_json(file)
    if not isinstance(record, dict) or not {"images", "annotations", "categories"} <= record.keys():
        missing = "images, annotations and categories"
        raise ValueError(f"{printable(file)} is not in COCO's form: it needs lists of {missing}")
    problems: list[str] = []
    try:
        library = COCO(record)
        entries = sorted(library.cats.values(), key=lambda entry: entry["id"])
        classes = list(dict.fromkeys(str(entry["name"]) for entry in entries))
        number_of = {name: number for number, name in enumerate(classes)}
        numbers = {entry["id"]: number_of[str(entry["name"])] for entry in entries}
        finder = _ImageFinder(file, root or _root(file))
        rows = [
            row
            for entry in library.imgs.values()
            if (row := _objects(entry, library.imgToAnns.get(entry["id"], []), numbers, finder, problems)) is not None
        ]
        strangers = [
            entry
            for image, annotations in library.imgToAnns.items()
            if image not in library.imgs
            for entry in annotations
        ]
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and printable(file) in str(error):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{printable(file)} is not in COCO's form: {reason}") from None
    if strangers:
        problems.append(f"{len(strangers)} annotations of {file.name} name an image that is not in its list")
    return collect(rows, classes, problems, file)


def _root(file: Path) -> Path:
    return file.parent.parent if file.parent.name.lower() == "annotations" else file.parent


def _objects(
    entry: dict[str, Any],
    annotations: Sequence[Any],
    numbers: dict[Any, int],
    finder: _ImageFinder,
    problems: list[str],
) -> Objects | None:
    """The objects of an entry of the list of images; None without the image."""
    name = str(entry["file_name"])
    path = finder.find(name)
    if path is None:
        problems.append(f"{printable(name)}: no such image near {printable(finder.file)}")
        return None
    size = (int(entry["width"]), int(entry["height"])) if entry.get("width") and entry.get("height") else None
    row = Objects(path, size)
    for annotation in annotations:
        category, box = annotation["category_id"], annotation.get("bbox")
        if category not in numbers or not isinstance(box, list) or len(box) != 4:
            lacking = (
                "no box of four numbers" if category in numbers else f"the category {category}, which is not listed"
            )
            problems.append(f"{printable(name)}: annotation {annotation.get('id')} has {lacking}")
            continue
        x, y, width, height = (float(value) for value in box)
        area = annotation.get("area")
        problem = row.add(
            [x, y, x + width, y + height],
            numbers[category],
            bool(annotation.get("iscrowd")),
            np.nan if area is None else float(area),
            annotation.get("segmentation") or None,
        )
        if problem:
            problems.append(problem)
    return row


def _image_folders(folder: Path) -> list[Path]:
    return [path for path in folders_in(folder) if path.name.lower() in ("images", "img", "imgs", "data")]


class _ImageFinder:
    """Finds the images that a file names, and never those of another split.

    Args:
        file: The JSON file.
        root: Folder of the dataset.
    """

    def __init__(self, file: Path, root: Path) -> None:
        self.file = file
        split = split_of(file.stem) or (None if file.parent == root else split_of(file.parent.name))
        inside = _image_folders(root)
        outer = [root, *folders_in(root), *(inner for path in inside for inner in folders_in(path))]
        places = list(dict.fromkeys([file.parent, *outer]))
        splits = {path: None if path == root else split_of(path.name) for path in places}
        for place in [path for path in places if splits[path]]:  # train/images beside train/labels.json
            splits |= {path: splits[place] for path in _image_folders(place) if path not in splits}
        places = list(splits)
        split = None if split == "trainval" else split
        self._split_places = [path for path in places if split and splits[path] == split]
        self._neutral_places = [path for path in places if splits[path] is None or split is None]

    def find(self, name: str) -> Path | None:
        """Find an image.

        Args:
            name: Its ``file_name``.

        Raises:
            ValueError: If several folders hold an image of this name.
        """
        windows = PureWindowsPath(name)
        parts = windows.parts if "\\" in name or windows.drive else Path(name).parts
        # A path of another machine: its end may be inside the dataset.
        ends = [Path(*parts[i:]) for i in range(1, len(parts))] if windows.anchor or Path(name).is_absolute() else []
        for end in [Path(*parts), *ends]:
            path = self._inside(end)
            if path is not None:
                return path
        return None

    def _inside(self, name: Path) -> Path | None:
        for places in (self._split_places, self._neutral_places):
            paths = {path.resolve(): path for place in places if is_regular(path := place / name)}
            if len(paths) > 1:
                examples = " and ".join(printable(path) for path in sorted(paths.values())[:2])
                raise ValueError(
                    f"{printable(self.file)}: {printable(name)} may be {examples}: keep the images of each split in a "
                    "folder that is named after it"
                )
            if paths:
                return next(iter(paths.values()))
        return None
