"""Boxes and polygons in YOLO's text files, parsed by supervision."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aptvit.datasets.boxes import BoxFiles, Objects, collect
from aptvit.datasets.splits import Splits, arrange, folders_in, read_parts, split_of, unwrap
from aptvit.files.images import find_images
from aptvit.files.regular import is_regular
from aptvit.files.text import printable, read_lines, read_yaml

__all__ = ["find_configuration", "find_yolo", "is_yolo", "read_yolo"]

_MAX_WORDS = 100_000  # of a line: a polygon


def is_yolo(folder: Path) -> bool:
    """Whether a folder holds a dataset of YOLO: a YAML file with the names of the classes, or ``labels``."""
    return bool(_configurations(folder)) or (folder / "labels").is_dir()


def _configurations(folder: Path) -> list[Path]:
    """YAML files that name classes."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".yaml", ".yml")]
    return [path for path in files if "names" in read_yaml(path)]


def find_configuration(folder: Path) -> Path | None:
    """The YAML file of a folder that names classes; None without one.

    Raises:
        ValueError: If there are several.
    """
    files = _configurations(folder)
    if len(files) > 1:
        examples = " and ".join(path.name for path in files[:2])
        raise ValueError(f"{printable(folder)} has {examples}: name the file of the dataset instead of the folder")
    return files[0] if files else None


def find_yolo(data: Path) -> Splits[BoxFiles]:
    """Find the splits of a dataset of YOLO.

    A YAML file with ``names`` and with folders, lists of files or both for ``train``, ``val`` and ``test``; or
    ``images/train`` beside ``labels/train``, with the names of the classes in ``classes.txt``.

    Args:
        data: The folder, or its YAML file.

    Raises:
        ValueError: If there are no names of classes, or a folder of the YAML file does not exist.
        ImportError: If supervision is not installed.
    """
    folder = data.parent if data.is_file() else unwrap(data, is_yolo)
    configuration = data if data.is_file() else find_configuration(folder)
    if configuration is None:
        return _without_configuration(folder)
    record = read_yaml(configuration)
    classes = _names(record, configuration)
    keys = [key for key in ("train", "val", "valid", "validation", "test") if record.get(key)]
    if not keys:
        raise ValueError(f"{printable(configuration)} names no folder of images: it needs train, and val")

    file = configuration

    def read(key: str) -> BoxFiles:
        return _read(_images(record, key, file), classes, f"{file}: {key}", _keypoints(record))

    return read_parts(arrange({key: key for key in keys}, file), read)


def _names(record: dict[str, Any], file: Path) -> list[str]:
    names = record.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{printable(file)}: names must be numbered from 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or any(isinstance(name, (list, dict)) for name in names):
        raise ValueError(f"{printable(file)}: names must be a list of the names of the classes")
    return [str(name) for name in names]


def _images(record: dict[str, Any], key: str, file: Path) -> list[Path]:
    """Image files of a split, from folders and lists."""
    values = record[key] if isinstance(record[key], list) else [record[key]]
    root = Path(str(record.get("path") or "."))
    roots = [root, file.parent / root, file.parent, file.parent / root.name]
    paths = []
    for value in map(str, values):
        # Exported datasets name folders beside the YAML file with a leading "../".
        words = [value, value.removeprefix("../")]
        paths_of_value = [base / word for base in roots for word in words]
        place = next((path for path in paths_of_value if is_regular(path) or os.path.isdir(path)), None)
        if place is None:
            raise ValueError(
                f"{printable(file)}: {key} is {value[:200]!r}, which does not exist: mend the path in the file"
            )
        if place.is_file() and place.suffix.lower() == ".txt":
            paths += [_path_in_list(line, place) for line in read_lines(place)]
        else:
            paths += find_images([place])
    return paths


def _path_in_list(line: str, file: Path) -> Path:
    return Path(line) if Path(line).is_absolute() else file.parent / line


def _without_configuration(folder: Path) -> Splits[BoxFiles]:
    names = next((path for path in (folder / "classes.txt", folder / "labels" / "classes.txt") if path.is_file()), None)
    if names is None:
        raise ValueError(
            f"{printable(folder)} has labels of YOLO and no names of classes: add data.yaml with names, or classes.txt"
        )
    classes = read_lines(names)
    images = folder / "images"
    if not images.is_dir():
        raise ValueError(f"{printable(folder)} has labels of YOLO and no folder images beside them")
    if not any(split_of(path.name) for path in folders_in(images)):
        return Splits(_read(find_images([images]), classes, images), None)
    splits = arrange({path: path.name for path in folders_in(images)}, images)
    return read_parts(splits, lambda path: _read(find_images([path]), classes, path))


def read_yolo(place: Path, configuration: Path) -> BoxFiles:
    """Read the images of a folder or a list with their labels.

    Args:
        place: A folder of images, or a text file with a path in each line.
        configuration: The YAML file with the names of the classes.

    Raises:
        ValueError: If there are no images or no names.
        ImportError: If supervision is not installed.
    """
    is_list = place.is_file()
    images = [_path_in_list(line, place) for line in read_lines(place)] if is_list else find_images([place])
    record = read_yaml(configuration)
    return _read(images, _names(record, configuration), place, _keypoints(record))


def _keypoints(record: dict[str, Any]) -> int:
    """Number of values for key points that follow the box in each line."""
    shape = record.get("kpt_shape") or [0]
    if not (isinstance(shape, list) and all(isinstance(side, int) and 0 <= side <= 1000 for side in shape)):
        raise ValueError(f"kpt_shape of YOLO must be one or two small numbers, not {str(shape)[:100]}")
    return math.prod(shape)


def _read(images: Sequence[Path], classes: Sequence[str], origin: Path | str, keypoints: int = 0) -> BoxFiles:
    rows, problems, backgrounds = [], [], []
    for image in images:
        if not is_regular(image):
            problems.append(f"{printable(image)}: no such image")
            continue
        labels = _labels_of(image)
        if labels is None:
            backgrounds.append(image)
        row = Objects(image)
        try:
            lines = [line.split() for line in read_lines(labels)] if labels else []
            lines = [line[:5] if keypoints and len(line) == 5 + keypoints else line for line in lines]
            problems += _add(row, lines, len(classes))
        except ValueError as error:
            problems.append(f"{printable(labels or image)}: {error}")
            continue
        rows.append(row)
    if backgrounds:
        problems.append(
            f"{len(backgrounds)} images have no file of labels, such as {printable(backgrounds[0])}: "
            "they count as images without objects"
        )
    return collect(rows, classes, problems, origin, relative=True)


def _labels_of(image: Path) -> Path | None:
    """The file of labels of an image: in ``labels`` instead of ``images``, or beside the image."""
    parts = image.parts
    above = [number for number, part in enumerate(parts[:-1]) if part == "images"]
    places = [Path(*parts[: above[-1]], "labels", *parts[above[-1] + 1 :])] if above else []
    files = [path.with_suffix(".txt") for path in (*places, image)]
    return next((path for path in files if is_regular(path)), None)


def _add(row: Objects, lines: Sequence[Sequence[str]], num_classes: int) -> list[str]:
    """Add the objects of the lines of a file; returns messages about objects that are left out.

    Raises:
        ValueError: If a line is wrong, so that the whole file is not to be trusted.
    """
    parse = _parser()
    problems = []
    for number, words in enumerate(lines, start=1):
        line, values = " ".join(words), words[1:]
        if len(words) > _MAX_WORDS:
            raise ValueError(f"line {number}: {len(words):,} values")
        try:
            detections = parse([line], (1, 1), False)
        except (ValueError, IndexError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}"[:300]) from None
        box, label = detections.xyxy[0].astype(float), int(detections.class_id[0])
        if not 0 <= label < num_classes:
            raise ValueError(f"line {number}: class {label}, and there are {num_classes} names of classes")
        if not (np.isfinite(box).all() and box.min() >= -0.01 and box.max() <= 1.01):
            raise ValueError(f"line {number}: coordinates must be shares of the sides, from 0 to 1, not {line[:100]!r}")
        outline = None if len(values) < 6 else [[float(value) for value in values[: len(values) // 2 * 2]]]
        problem = row.add(box.tolist(), label, outline=outline)
        if problem:
            problems.append(problem)
    return problems


def _parser() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for OpenCV, which drawing needs and parsing does not
            from supervision.dataset.formats.yolo import yolo_annotations_to_detections
    except ImportError:
        raise ImportError("YOLO's labels are parsed by supervision: pip install 'aptvit[dense]'") from None
    return yolo_annotations_to_detections
