"""Datasets of the library ``datasets``, from the Hugging Face hub or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from aptvit.datasets.sources import MAX_CLASSES, UNLABELLED, CountsClasses
from aptvit.datasets.splits import Splits, arrange
from aptvit.files.images import ImageError, open_image

__all__ = ["find_hub"]

_IMAGE, _LABEL = ("image", "img"), ("label", "labels")


@dataclass(frozen=True)
class HubDataset(CountsClasses):
    """A split of a dataset in the layout of the library ``datasets``.

    Attributes:
        rows: The split, whose images are not decoded.
        image: Name of the column of images.
        labels: Class of each row, -1 for none; None without labels.
        classes: Names of the classes.
        dataset: Name of the dataset, for messages.
        problems: Messages about what was left out.
        origin: Where the images are from.
    """

    rows: Any
    image: str
    labels: Sequence[int] | None
    classes: Sequence[str]
    dataset: str
    problems: Sequence[str] = ()
    origin: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.dataset}[{index}]"

    def label(self, index: int) -> int:
        return UNLABELLED if self.labels is None else self.labels[index]

    def load(self, index: int) -> tuple[Image.Image, int]:
        value = self.rows[index][self.image]  # not decoded: {"bytes": ..., "path": ...}
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise ImageError(f"{self.name(index)}: the row has no image")
        if value["bytes"] is None:
            return open_image(value["path"]), self.label(index)
        return open_image(self.name(index), data=value["bytes"]), self.label(index)

    def relabelled(self, labels: Sequence[int], classes: Sequence[str]) -> HubDataset:
        return replace(self, labels=labels, classes=classes)


def find_hub(name: str, train: str | None = None, val: str | None = None) -> Splits[HubDataset]:
    """Load a dataset of the hub, or one that ``save_to_disk`` wrote.

    Args:
        name: Its name, or its folder.
        train: Name of the training split; by default that whose name says so.
        val: Name of the evaluation split.

    Raises:
        ValueError: If there is no such dataset or split, or it is ambiguous which columns hold images and labels.
        ImportError: If ``datasets`` is not installed.
    """
    rows = _load(name)
    if not isinstance(rows, dict):
        rows = {train or "train": rows}
    names = {split: split for split in rows}
    chosen = arrange(names, name) if train is None else Splits([train], None)
    if len(chosen.train) != 1:
        raise ValueError(f"the dataset {name} has the splits {', '.join(names)}: name them with --train and --val")
    evaluation = val if val is not None else next(iter(chosen.evaluation or ()), None)
    for split in (chosen.train[0], evaluation):
        if split is not None and split not in rows:
            raise ValueError(f"the dataset {name} has no split {split}: it has {', '.join(names)}")
    parts = [None if split is None else _split(rows[split], name, split) for split in (chosen.train[0], evaluation)]
    assert parts[0] is not None
    return Splits(parts[0], parts[1], chosen.left_out)


def _load(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError("hf: needs the library datasets: pip install 'aptvit[data]'") from None
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name)
    except Exception as error:  # of many types, such as those of damaged files
        raise ValueError(f"cannot load the dataset {name}: {' '.join(str(error).split())[:200]}") from None


def _split(rows: Any, name: str, split: str) -> HubDataset:
    import datasets

    kinds = rows.features
    image = _column([key for key, kind in kinds.items() if isinstance(kind, datasets.Image)], _IMAGE, "images", name)
    if image is None:
        raise ValueError(f"the dataset {name} has no column of images: it has {', '.join(kinds)}")
    named = [key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    label = _column(named or [key for key in kinds if key in _LABEL], _LABEL, "labels", name)
    labels, classes = (None, []) if label is None else _labels(rows, label, name)
    not_decoded = rows.cast_column(image, datasets.Image(decode=False))
    return HubDataset(not_decoded, image, labels, classes, name, (), f"{split} of {name}")


def _column(columns: Sequence[str], usual: Sequence[str], kind: str, name: str) -> str | None:
    """The only column of a kind, or that with the usual name.

    Raises:
        ValueError: If there are several and none has the usual name.
    """
    chosen = [column for column in columns if column in usual] or list(columns)
    if len(chosen) > 1:
        raise ValueError(
            f"the dataset {name} has several columns of {kind}, {', '.join(columns)}: keep one, or rename it to "
            f"{usual[0]!r}, with datasets, and save it with save_to_disk"
        )
    return chosen[0] if chosen else None


def _labels(rows: Any, column: str, name: str) -> tuple[list[int], list[str]]:
    """Class of each row, and names of the classes, from a column of ClassLabel, numbers or text."""
    kind, values = rows.features[column], rows[column]
    values = list(values)
    if hasattr(kind, "names"):
        return [UNLABELLED if value is None else int(value) for value in values], list(kind.names)
    present = {value for value in values if value is not None}
    if present and all(isinstance(value, str) for value in present):
        classes = sorted(present)
        numbers = {value: number for number, value in enumerate(classes)}
        return [UNLABELLED if value is None else numbers[value] for value in values], classes
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= UNLABELLED for value in present):
        raise ValueError(f"the dataset {name}: labels in the column {column} must be numbers or names of classes")
    greatest = max(present, default=UNLABELLED)
    if greatest >= MAX_CLASSES:
        raise ValueError(f"the dataset {name}: {greatest} in the column {column} is above {MAX_CLASSES:,}")
    numbers_of_rows = [UNLABELLED if value is None else int(value) for value in values]
    return numbers_of_rows, [str(number) for number in range(greatest + 1)]
