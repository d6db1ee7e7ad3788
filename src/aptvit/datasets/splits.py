"""Which part of a dataset is for training, and which for validation: one rule, by whole words in names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from aptvit.files.images import SUFFIXES
from aptvit.files.text import printable

__all__ = ["Splits", "arrange", "by_name", "describe", "folders_in", "read_parts", "resolve", "split_of", "unwrap"]

T = TypeVar("T")
U = TypeVar("U")

_SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "validation", "valid", "dev", "valset", "devset"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    "trainval": "trainval",
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_REMEDY = "name the splits with --train and --val"


@dataclass(frozen=True)
class Splits(Generic[T]):
    """The parts of a dataset.

    Attributes:
        train: What is trained on.
        evaluation: What is evaluated on, or None.
        left_out: Messages about what belongs to neither.
    """

    train: T
    evaluation: T | None
    left_out: tuple[str, ...] = ()


def split_of(name: str) -> str | None:
    """Return the split that a name of a folder, file, list or shard stands for.

    Words are separated by digits, punctuation and changes of case, and count as a whole: ``instances_train2017`` is of
    the training split, ``constraint`` and ``strainer`` are of none.

    Args:
        name: The name, without the ending of a file.

    Returns:
        ``"train"``, ``"val"``, ``"test"``, ``"trainval"``, or None.

    Raises:
        ValueError: If the name stands for the training and for the test split.
    """
    words = {_SPLITS[word.lower()] for word in _WORD.findall(name) if word.lower() in _SPLITS}
    if words >= {"train", "test"} or words >= {"val", "test"}:
        raise ValueError(f"{printable(name)} names {' and '.join(sorted(words))}: {_REMEDY}")
    return "trainval" if len(words) > 1 else next(iter(words), None)


def arrange(
    names: Mapping[T, str],
    place: Path | str,
    several: bool = False,
    is_content: Callable[[T], bool] = lambda _: True,
    remedy: str = _REMEDY,
) -> Splits[list[T]]:
    """Assign parts of a dataset to the splits that their names stand for.

    A part whose whole name is a split comes before one that only contains the word. Evaluation uses the validation
    split, else the test split. Without any split in the names, all parts are for training.

    Args:
        names: The name of each part, without endings.
        place: The dataset, for messages.
        several: Whether a split may have several parts, as of shards.
        is_content: Whether a part without a split holds data, so that leaving it out is worth a message.
        remedy: What to do about ambiguous names, for messages.

    Raises:
        ValueError: If the names are ambiguous: two parts for a split, or a training split beside parts with data that
            belong to no split and no validation split that would explain it.
    """
    by_split: dict[str | None, list[T]] = {}
    for part, name in names.items():
        by_split.setdefault(split_of(name), []).append(part)
    neutral = by_split.pop(None, [])
    if not by_split:
        return Splits(neutral, None)
    neutral = [part for part in neutral if is_content(part)]
    kind = "train" if "train" in by_split else "trainval"
    evaluation = next((split for split in ("val", "test") if split in by_split), None)
    if kind == "trainval" and evaluation == "val":  # its images are in the training split already
        evaluation = "test" if "test" in by_split else None
    examples = ", ".join(printable(names[part]) for parts in by_split.values() for part in parts)
    if kind not in by_split:
        whole = f"or {printable(place)} itself as a split"
        raise ValueError(f"{printable(place)} has {examples}, and no training split: {remedy}, {whole}")
    if neutral and evaluation is None:
        raise ValueError(
            f"{printable(place)} has {examples} beside {printable(names[neutral[0]])}, which is no split: {remedy}, or "
            f"{printable(place)} itself as a split"
        )
    chosen = [_parts(by_split[split], names, place, several, remedy) if split else None for split in (kind, evaluation)]
    used = {id(part) for parts in chosen if parts for part in parts}
    unused = [part for parts in (*by_split.values(), neutral) for part in parts if id(part) not in used]
    left_out = tuple(f"{printable(place)}: {printable(names[part])} is not used" for part in unused)
    assert chosen[0] is not None
    return Splits(chosen[0], chosen[1], left_out)


def _parts(parts: list[T], names: Mapping[T, str], place: Path | str, several: bool, remedy: str) -> list[T]:
    """The parts of a split: those whose whole name is the split, if there are any."""
    exact = [part for part in parts if names[part].lower() in _SPLITS]
    if several or len(parts) == 1:
        return parts
    if len(exact) == 1:
        return exact
    examples = " and ".join(sorted(printable(names[part]) for part in exact or parts)[:3])
    raise ValueError(f"{printable(place)} has {examples} for the same split: {remedy}")


def read_parts(splits: Splits[list[T]], read: Callable[[T], U]) -> Splits[U]:
    """Read the part that `arrange` found for each split.

    Args:
        splits: The parts.
        read: Reads one.
    """
    evaluation = read(splits.evaluation[0]) if splits.evaluation else None
    return Splits(read(splits.train[0]), evaluation, splits.left_out)


def folders_in(folder: Path) -> list[Path]:
    """List the folders in a folder, sorted, without hidden ones and those that archivers add."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot read {printable(folder)}: {error.strerror}") from None
    return [path for path in entries if path.is_dir() and not path.name.startswith((".", "__MACOSX"))]


def unwrap(folder: Path, is_dataset: Callable[[Path], bool]) -> Path:
    """Look through folders that only wrap a dataset, as archives have them.

    Args:
        folder: The folder that was named.
        is_dataset: Whether a folder is the dataset itself.

    Returns:
        The folder itself, or the one inside it that is not a mere wrapper.
    """
    while not is_dataset(folder):
        folders = folders_in(folder)
        if len(folders) != 1 or split_of(folders[0].name) or not (is_dataset(folders[0]) or folders_in(folders[0])):
            break
        if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            break
        folder = folders[0]
    return folder


def resolve(data: Path | str | None, value: str) -> Path:
    """Return the path that --train or --val names: as it is, or inside the dataset.

    Args:
        data: The dataset, or None.
        value: The value.

    Raises:
        ValueError: If there is no such path.
    """
    for path in (Path(value), *([] if data is None else [Path(data) / value])):
        if path.exists():
            return path
    raise ValueError(
        f"{value} does not exist{'' if data is None else f', nor in {data}'}: --train and --val name paths"
    )


def describe(train: Any, evaluation: Any) -> str:
    """Tell in a line what a dataset was taken for.

    Args:
        train: The images to train on: with a length, ``origin``, ``classes``, and ``note`` if there is more to tell.
        evaluation: The images to evaluate on, or None.
    """
    parts = [f"train: {_count(train)}"]
    parts.append("no validation" if evaluation is None else f"validation: {_count(evaluation)}")
    number = len(train.classes)
    if number:
        parts.append(f"{number} class{'es' if number != 1 else ''}")
    parts += [note for note in [getattr(train, "note", "")] if note]
    return ", ".join(parts)


def _count(images: Any) -> str:
    return f"{len(images):,} image{'s' if len(images) != 1 else ''} from {printable(images.origin)}"


def by_name(classes: Sequence[str], classes_of_training: Sequence[str], place: str) -> list[int]:
    """Number in the training split of each class of another split, by name.

    Args:
        classes: Classes of the other split.
        classes_of_training: Classes of the training split.
        place: The other split, for messages.

    Raises:
        ValueError: If a class is not one of the training split.
    """
    unknown = [name for name in classes if name not in classes_of_training]
    if unknown:
        raise ValueError(
            f"{place} has the class {unknown[0]!r}, which the training split does not have "
            f"({_first_names(classes_of_training)}): the splits must have the same classes"
        )
    return [classes_of_training.index(name) for name in classes]


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
