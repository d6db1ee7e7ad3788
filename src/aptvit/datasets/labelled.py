"""Images with class labels: a folder, a table of labels, or a folder for each class."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset

from aptvit.datasets.splits import arrange, folders_in, split_of
from aptvit.files.images import find_images
from aptvit.files.regular import is_regular
from aptvit.files.text import printable, read_text

__all__ = ["LabelledImages", "find_labelled", "find_labels", "labels_of"]

LABELS_FILE = "labels.csv"


@dataclass(frozen=True)
class LabelledImages:
    """Image files, with class labels if there are any.

    Attributes:
        paths: Image files.
        labels: Class index of each file; None without labels.
        source: Description of the source of the labels.
        skipped: Messages about files that were left out.
    """

    paths: list[Path]
    labels: list[int] | None
    source: str
    skipped: list[str] = field(default_factory=list)

    def spread(self, count: int | None) -> LabelledImages:
        """At most ``count`` images, evenly spaced in the list, so that all classes of a sorted list are represented.

        Raises:
            ValueError: If the count is below 1.
        """
        if count is not None and count < 1:
            raise ValueError(f"{count} images cannot be measured: give at least 1")
        if count is None or count >= len(self.paths):
            return self
        chosen = np.linspace(0, len(self.paths) - 1, count).round().astype(int)
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return replace(self, paths=[self.paths[i] for i in chosen], labels=labels)


def find_labelled(source: Path, num_classes: int, classes: Sequence[str] = ()) -> LabelledImages:
    """Find images and labels.

    - A CSV file with the columns file and class_index; file names are relative to its folder.
    - A folder with such a file named labels.csv.
    - A folder with a sub-folder for each class, all of them named as the model's classes, by class index, ImageNet's
      wnid (n01440764) or ImageNet's word (tench). If it has such folders for each split, the validation split counts,
      else the test split.
    - Any other folder, or one image: images without labels.

    Args:
        source: The folder or file.
        num_classes: Classes of the model, which identify the ImageNet subset.
        classes: Names of the model's classes, if they are known.

    Raises:
        ValueError: If there are no images, or labels are invalid or match no file.
    """
    if source.is_dir():
        if (source / LABELS_FILE).is_file():
            return _from_table(source / LABELS_FILE, num_classes)
        return _from_folders(_evaluation_split(source), num_classes, classes)
    if source.suffix.lower() == ".csv":
        return _from_table(source, num_classes)
    return LabelledImages(find_images([source]), None, "none")


def find_labels(folder: Path, num_classes: int, classes: Sequence[str] = ()) -> dict[Path, int]:
    """Find the class index of each image in a folder, as `find_labelled` does, in all of its splits.

    Args:
        folder: The folder.
        num_classes: Classes of the model, which identify the ImageNet subset.
        classes: Names of the model's classes, if they are known.

    Raises:
        ValueError: If there are no images, or labels are invalid or match no file.
    """
    splits = [] if (folder / LABELS_FILE).is_file() else [path for path in folders_in(folder) if split_of(path.name)]
    classes_of: dict[Path, int] = {}
    for part in splits or [folder]:
        labelled = find_labelled(part, num_classes, classes)
        classes_of |= zip(labelled.paths, labelled.labels or [], strict=False)
    return classes_of


def labels_of(table: Path, paths: Sequence[Path], num_classes: int) -> list[int]:
    """Class index of each image, by its file name.

    Args:
        table: CSV file with the columns file and class_index.
        paths: Image files.
        num_classes: Of the model.

    Raises:
        ValueError: If the table is wrong, or has no class for a file.
    """
    classes = _read_table(table, num_classes)
    missing = [path.name for path in paths if path.name not in classes]
    if missing:
        raise ValueError(f"{table} has no class for {len(missing)} of {len(paths)} images, such as {missing[0]}")
    return [classes[path.name] for path in paths]


# A table


def _from_table(table: Path, num_classes: int) -> LabelledImages:
    classes = _read_table(table, num_classes)
    present = [name for name in classes if is_regular(table.parent / name)]
    if not present:
        named = f"such as {printable(next(iter(classes)))[:200]}" if classes else "as it has no rows"
        raise ValueError(f"{table} names no file that is in {table.parent}, {named}: names are relative to that folder")
    skipped = [f"{table.parent / name}: named in {table.name}, but there is no such file" for name in classes]
    skipped = [printable(text) for name, text in zip(classes, skipped, strict=True) if name not in set(present)]
    paths = [table.parent / name for name in present]
    return LabelledImages(paths, [classes[name] for name in present], f"{table.name} ({len(present)} images)", skipped)


def _read_table(table: Path, num_classes: int) -> dict[str, int]:
    """Class of each file name."""
    try:
        reader = csv.DictReader(read_text(table).splitlines())
        columns, rows = reader.fieldnames or (), list(reader)
    except csv.Error as error:
        raise ValueError(f"{printable(table)} is no table of labels: {error}") from None
    if not {"file", "class_index"} <= set(columns):
        names = printable(", ".join(columns)[:200]) or "none"
        raise ValueError(f"{printable(table)} must have the columns file and class_index; it has {names}")
    classes: dict[str, int] = {}
    for number, row in enumerate(rows, start=2):
        name, word = row["file"], row["class_index"]
        index = int(word) if word is not None and re.fullmatch("[0-9]{1,9}", word.strip()) else None
        if not name or index is None or index >= num_classes:
            raise ValueError(
                f"{table} line {number}: class_index {word and word[:100]!r} of file {name and name[:200]!r} must be a "
                f"whole number from 0 to {num_classes - 1}, the classes of the model"
            )
        if classes.setdefault(name, index) != index:
            raise ValueError(f"{table} line {number}: {name} has two classes, {classes[name]} and {index}: keep one")
    return classes


# A folder for each class


def _evaluation_split(folder: Path) -> Path:
    """The folder of the split to evaluate on, or the folder itself without splits."""
    inner = {path: path.name for path in folders_in(folder)}
    if not any(split_of(name) for name in inner.values()):
        return folder
    splits = arrange(inner, folder, remedy="name the folder of the split to evaluate on")
    return (splits.evaluation or splits.train)[0]


def _from_folders(folder: Path, num_classes: int, classes: Sequence[str]) -> LabelledImages:
    paths = find_images([folder])
    names = [path.relative_to(folder).parts[0] for path in paths]
    if any(path.parent == folder for path in paths):
        return LabelledImages(paths, None, "none")
    distinct = sorted(set(names))
    indices = _class_indices(distinct, num_classes, classes)
    if all(index is None for index in indices):
        return LabelledImages(paths, None, "none (the sub-folders are named after no classes)")
    unknown = [name for name, index in zip(distinct, indices, strict=True) if index is None]
    if unknown:
        raise ValueError(
            f"{folder} has {len(distinct) - len(unknown)} sub-folders named after classes, and {len(unknown)} that are "
            f"not, such as {unknown[0]}: move them away, or give a {LABELS_FILE} with the columns file and class_index"
        )
    by_name = dict(zip(distinct, indices, strict=True))
    labels = [index for name in names if (index := by_name[name]) is not None]
    return LabelledImages(paths, labels, f"names of {len(distinct)} sub-folders")


def _class_indices(names: Sequence[str], num_classes: int, classes: Sequence[str]) -> list[int | None]:
    """Class index of each name, or None: by the model's names, by numbers, or by wnids and words of ImageNet."""
    by_name: dict[str, int | None] = {}
    for number, name in enumerate(classes):
        by_name[name] = None if name in by_name else number  # a name of two classes gives no label
    chosen = [by_name.get(name) for name in names]
    if all(number is not None for number in chosen):
        return chosen
    numbers = {str(i): i for i in range(num_classes)}
    if any(name.isdigit() for name in names):
        return [numbers.get(name.lstrip("0") or "0") if name.isdigit() else None for name in names]
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return chosen
    info = ImageNetInfo(subset)
    wnids = {wnid: i for i, wnid in enumerate(info.label_names())}
    words: dict[str, int | None] = {}
    for i in range(num_classes):
        for word in {_plain(word) for word in info.index_to_description(i).split(",")}:
            # Ambiguous words, such as crane (a bird and a machine), give no label.
            words[word] = None if word in words else i
    known_words = [wnids.get(name, words.get(_plain(name))) for name in names]
    return [number if number is not None else word for number, word in zip(chosen, known_words, strict=True)]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")
