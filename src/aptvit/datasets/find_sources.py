"""Find images with classes, in folders, tar shards or datasets of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from aptvit.datasets.folders import find_folders, read_folder
from aptvit.datasets.hub import find_hub
from aptvit.datasets.shards import find_shards, is_shards, read_shards
from aptvit.datasets.sources import UNLABELLED, Source, with_classes
from aptvit.datasets.splits import Splits, resolve
from aptvit.files.text import printable

__all__ = ["find_sources"]


def find_sources(
    data: str | Path | None, labelled: bool = True, train: str | None = None, val: str | None = None
) -> tuple[Source, Source | None]:
    """Find a dataset: its training split and, if there is one, its evaluation split.

    Args:
        data: A folder with a folder for each class, or with such folders in ``train`` and ``val``; ``*.tar`` shards (a
            folder or a pattern; their names contain ``train`` and ``val`` for splits); or ``hf:NAME``, a dataset of the
            hub or on disk. None if ``train`` says all.
        labelled: Whether classes are needed; without classes any folder of images is valid.
        train: Folder, shards or split of the dataset to train on, instead of what names say.
        val: The same to evaluate on.

    Returns:
        Training images, and evaluation images or None, with the same classes.

    Raises:
        ValueError: If there are no images, no classes, classes of the evaluation split that training does not have, or
            it is ambiguous which images belong to a split.
        ImportError: If ``datasets`` or ``webdataset`` is needed and not installed.
    """
    splits = _find(data, labelled, train, val)
    source, evaluation = splits.train, splits.evaluation
    if labelled and source.num_classes < 1:
        raise ValueError(
            f"{printable(source.origin)} has no classes: give a folder with a folder for each class, or train without "
            "labels"
        )
    if labelled and not any(source.label(index) != UNLABELLED for index in range(len(source))):
        raise ValueError(f"{printable(source.origin)}: no image has a label")
    if labelled and evaluation is not None:
        evaluation = with_classes(evaluation, source.classes)
    return _with_problems(source, [*splits.left_out, *_unlabelled(source, labelled)]), evaluation


def _find(data: str | Path | None, labelled: bool, train: str | None, val: str | None) -> Splits[Any]:
    word = None if data is None else str(data)
    if word is not None and word.startswith("hf:"):
        return find_hub(word.removeprefix("hf:"), train, val)
    if train is not None:
        evaluation = None if val is None else _read(word, val, labelled)
        return Splits(_read(word, train, labelled), evaluation)
    if word is None:
        raise ValueError("there is no dataset: name it, or its splits with --train and --val")
    splits: Splits[Any] = find_shards(word) if is_shards(word) else find_folders(Path(word), labelled)
    return splits if val is None else replace(splits, evaluation=_read(word, val, labelled))


def _read(data: str | None, value: str, labelled: bool) -> Source:
    """Read a split that was named: shards, a folder, or a dataset of the hub."""
    if value.startswith("hf:"):
        return find_hub(value.removeprefix("hf:")).train
    if any(letter in value for letter in "*{"):
        return read_shards(value)
    path = resolve(data, value)
    return read_shards(str(path)) if is_shards(str(path)) else read_folder(path, labelled)


def _unlabelled(source: Source, labelled: bool) -> list[str]:
    """A message about images without a label."""
    without = [index for index in range(len(source)) if labelled and source.label(index) == UNLABELLED]
    if not without:
        return []
    subject = "1 image has" if len(without) == 1 else f"{len(without)} images have"
    return [f"{subject} no label, such as {source.name(without[0])}: without weight in the loss"]


def _with_problems(source: Any, problems: list[str]) -> Any:
    return replace(source, problems=[*problems, *source.problems]) if problems else source
