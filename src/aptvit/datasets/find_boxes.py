"""Find images with boxes in the formats of Pascal VOC, COCO and YOLO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aptvit.datasets.boxes import BoxFiles
from aptvit.datasets.coco import find_coco, is_coco, read_coco
from aptvit.datasets.splits import Splits, resolve, unwrap
from aptvit.datasets.voc import find_voc, is_voc, read_voc
from aptvit.datasets.yolo import find_configuration, find_yolo, is_yolo, read_yolo
from aptvit.files.text import printable

__all__ = ["find_boxes"]

_FORMATS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Splits[BoxFiles]]]] = {
    "Pascal VOC": (is_voc, find_voc),
    "COCO": (is_coco, find_coco),
    "YOLO": (is_yolo, find_yolo),
}


def find_boxes(
    data: Path | str | None, train: str | None = None, val: str | None = None
) -> tuple[BoxFiles, BoxFiles | None]:
    """Find images with boxes: the training split and, if there is one, the evaluation split.

    Formats are Pascal VOC (``JPEGImages/``, ``Annotations/*.xml``, lists in ``ImageSets/Main``), COCO (a JSON file, or
    a folder with ``annotations/instances_train*.json`` and ``..._val*.json``, or with ``annotations.json``) and YOLO
    (``data.yaml``, or ``images/`` beside ``labels/`` and ``classes.txt``); see docs/how-to/datasets.md.

    Args:
        data: The folder, COCO's JSON file, or YOLO's YAML file; None if ``train`` says all.
        train: File, list or folder of the training split, by itself or inside ``data``, instead of what names say.
        val: The same for the evaluation split.

    Returns:
        Training images, and evaluation images or None, with the same classes.

    Raises:
        ValueError: If the format is another one, names are ambiguous, classes differ, or there are no boxes.
        ImportError: If the library that reads the format is not installed.
    """
    if data is not None and not Path(data).exists():
        raise ValueError(
            f"{data} does not exist: give a folder in the form of Pascal VOC, COCO or YOLO, COCO's JSON file or "
            "YOLO's YAML file"
        )
    if train is None:
        if data is None:
            raise ValueError("there is no dataset: name it, or its splits with --train and --val")
        splits = _find(Path(data))
    else:
        splits = Splits(_read(data, train), None)
    if val is not None:
        splits = replace(splits, evaluation=_read(data, val))
    files, evaluation = replace(splits.train, problems=[*splits.left_out, *splits.train.problems]), splits.evaluation
    if not any(len(boxes) for boxes in files.boxes):
        reasons = "; ".join(files.problems[:2]) or "check that its annotations name its images"
        raise ValueError(f"{printable(files.origin)} has no boxes to train on: {reasons}")
    if evaluation is not None and list(evaluation.classes) != list(files.classes):
        evaluation = evaluation.with_classes(files.classes)
    return files, evaluation


def _find(data: Path) -> Splits[BoxFiles]:
    if data.is_file():
        return find_yolo(data) if data.suffix.lower() in (".yaml", ".yml") else find_coco(data)
    folder = unwrap(data, lambda path: any(is_format(path) for is_format, _ in _FORMATS.values()))
    formats = [name for name, (is_format, _) in _FORMATS.items() if is_format(folder)]
    if len(formats) > 1:
        raise ValueError(
            f"{printable(folder)} has annotations of {' and of '.join(formats)}: name COCO's JSON file or YOLO's YAML "
            "file instead of the folder, or the splits with --train and --val"
        )
    if not formats:
        raise ValueError(
            f"{printable(folder)} is in no known format: give that of Pascal VOC (Annotations/, JPEGImages/), of COCO "
            "(a JSON file) or of YOLO (data.yaml)"
        )
    return _FORMATS[formats[0]][1](folder)


def _read(data: Path | str | None, value: str) -> BoxFiles:
    """Read a split that was named: a JSON file, a list, or a folder."""
    path = resolve(data, value)
    folder = None if data is None else Path(data)
    if path.suffix.lower() == ".json":
        return read_coco(path)
    if path.is_dir() and is_voc(path):
        return read_voc(path)
    if path.is_dir() and is_coco(path):
        return find_coco(path).train
    if folder is not None and folder.is_dir() and is_voc(folder) and path.is_file():
        return read_voc(folder, path)
    if folder is not None and (folder.is_file() or is_yolo(folder)):
        configuration = folder if folder.is_file() else find_configuration(folder)
        if configuration is not None:
            return read_yolo(path, configuration)
    raise ValueError(
        f"{printable(path)} is no split that can be read: name COCO's JSON file, a list of Pascal VOC or YOLO, or a "
        "folder with annotations, and the dataset"
    )
