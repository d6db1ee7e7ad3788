"""Training images from folders, tar shards and datasets of the hub, accessed by number."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from aptvit.files.images import SUFFIXES, find_images, open_image

__all__ = ["Source", "find_sources", "hold_back", "photos"]

_TRAIN, _EVAL = ("train", "training"), ("val", "validation", "valid", "test")
UNLABELLED = -1


class Source(Protocol):
    """A dataset of images, accessed by number."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; empty if images have no labels."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if images have no labels."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image for messages."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Read an upright RGB image and its class, -1 for none.

        Raises:
            ImageError: If the image cannot be read.
        """


@dataclass(frozen=True)
class Files:
    """Image files and their classes."""

    paths: Sequence[Path]
    labels: Sequence[int] | None = None
    classes: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        label = UNLABELLED if self.labels is None else self.labels[index]
        return open_image(self.paths[index]), label


@dataclass(frozen=True)
class Shards:
    """WebDataset's tar files, ``KEY.jpg`` beside ``KEY.cls`` (a number) or ``KEY.json`` with a "label".

    Headers are read once, for random access: each epoch has its own order over all shards, and an interrupted training
    can be resumed.
    """

    entries: Sequence[tuple[str, str, int, int, int]]  # shard, member, offset, size, label
    num_classes: int

    @property
    def classes(self) -> Sequence[str]:
        return [str(number) for number in range(self.num_classes)]

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.entries[index][0]}:{self.entries[index][1]}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        shard, _, offset, size, label = self.entries[index]
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        return open_image(self.name(index), data=content), label


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset in the layout of the library ``datasets``."""

    rows: Any
    image: str
    label: str | None
    classes: Sequence[str]
    dataset: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.dataset}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        value = row[self.image]  # not decoded: {"bytes": ..., "path": ...}
        label = UNLABELLED if self.label is None else int(row[self.label])
        if value["bytes"] is None:
            return open_image(value["path"]), label
        return open_image(self.name(index), data=value["bytes"]), label


@dataclass(frozen=True)
class Part:
    """A subset of the images of a source."""

    source: Source
    indices: Sequence[int] = field(repr=False)

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(self.indices[index])


def photos(paths: Sequence[Path | str]) -> Source:
    """A source of images without labels.

    Args:
        paths: Image files, and folders, which are searched recursively.

    Raises:
        ValueError: If a path does not exist, or there are no images.
    """
    return Files(find_images(paths))


def find_sources(data: str | Path, labelled: bool = True) -> tuple[Source, Source | None]:
    """Find a dataset: its training split and, if there is one, its evaluation split.

    Args:
        data: A folder with a folder for each class, or with such folders in ``train`` and ``val``; ``*.tar`` shards (a
            folder or a pattern; their names contain ``train`` and ``val`` for splits); or ``hf:NAME``, a dataset of the
            hub or on disk.
        labelled: Whether classes are needed; without classes any folder of images is valid.

    Returns:
        Training images, and evaluation images or None.

    Raises:
        ValueError: If there are no images, or no classes.
        ImportError: If ``datasets`` is needed and not installed.
    """
    word = str(data)
    if word.startswith("hf:"):
        sources = _hub(word.removeprefix("hf:"))
    elif word.endswith(".tar") or (Path(word).is_dir() and any(Path(word).rglob("*.tar"))):
        sources = _shards(word)
    else:
        sources = _folders(Path(word), labelled)
    train, evaluation = sources
    if labelled and train.num_classes < 1:
        raise ValueError(f"{word} has no classes: give a folder with a folder for each class, or train without labels")
    if evaluation is not None and labelled and evaluation.num_classes != train.num_classes:
        raise ValueError(
            f"{word} has {train.num_classes} classes to train and {evaluation.num_classes} to evaluate: give the same"
        )
    return sources


def hold_back(source: Source, share: float) -> tuple[Source, Source | None]:
    """Split a source into images to train on and images held back for evaluation.

    Args:
        source: The source.
        share: Share of the images to hold back: every n-th image.

    Returns:
        Training images, and held back images or None.
    """
    training, evaluation = split_indices(len(source), share)
    return (Part(source, training), Part(source, evaluation)) if evaluation else (source, None)


def split_indices(number: int, share: float) -> tuple[list[int], list[int]]:
    """Split the numbers below ``number``: those to train on, and every n-th, which is held back."""
    period = max(2, round(1 / share)) if share > 0 else number + 1
    evaluation = range(period - 1, number, period) if number > 1 else range(0)
    return [i for i in range(number) if i not in evaluation], list(evaluation)


def _folders(root: Path, labelled: bool) -> tuple[Source, Source | None]:
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: give a folder of images, *.tar shards, or hf:NAME")
    train = next((root / name for name in _TRAIN if (root / name).is_dir()), None)
    evaluation = next((root / name for name in _EVAL if (root / name).is_dir()), None)
    if train is None:
        return _folder(root, labelled), None
    parts = _folder(train, labelled), None if evaluation is None else _folder(evaluation, labelled)
    if parts[1] is not None and parts[0].classes != parts[1].classes:
        unshared = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(f"{train} and {evaluation} must hold the same classes: {unshared[0]!r} is in one of them only")
    return parts


def _folder(root: Path, labelled: bool) -> Files:
    paths = find_images([root])
    if not labelled:
        return Files(paths)
    classes = sorted({path.relative_to(root).parts[0] for path in paths if len(path.relative_to(root).parts) > 1})
    inside = [path for path in paths if len(path.relative_to(root).parts) > 1]
    numbers = {name: i for i, name in enumerate(classes)}
    return Files(inside, [numbers[path.relative_to(root).parts[0]] for path in inside], classes)


def _shards(word: str) -> tuple[Source, Source | None]:
    path = Path(word)
    files = sorted(map(str, path.rglob("*.tar")) if path.is_dir() else glob(word))
    if not files:
        raise ValueError(f"no shards match {word}: give a folder of *.tar files on this machine, or a pattern")
    evaluation = [file for file in files if any(name in Path(file).name for name in _EVAL)]
    train = [file for file in files if file not in evaluation]
    if not train:
        train, evaluation = files, []
    entries = [_entries(train), _entries(evaluation)]
    num_classes = 1 + max((label for group in entries for *_, label in group), default=UNLABELLED)
    if not entries[0]:
        raise ValueError(f"no images in {train[0]}: shards hold KEY.jpg beside KEY.cls")
    return Shards(entries[0], num_classes), Shards(entries[1], num_classes) if evaluation else None


def _entries(files: Sequence[str]) -> list[tuple[str, str, int, int, int]]:
    """Images of tar files: shard, member, offset, size, label."""
    entries = []
    for file in files:
        images, labels = {}, {}
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    key, _, ending = member.name.rpartition("/")[2].partition(".")
                    key = member.name.rpartition("/")[0] + "/" + key
                    if f".{ending.lower()}" in SUFFIXES:
                        images[key] = member
                    elif ending in ("cls", "json"):
                        content = tar.extractfile(member)
                        text = content.read().decode() if content else ""
                        labels[key] = int(text) if ending == "cls" else int(json.loads(text).get("label", UNLABELLED))
        except (tarfile.TarError, ValueError, OSError) as error:
            raise ValueError(f"{file} is no shard of images and labels: {error}") from None
        entries += [
            (file, member.name, member.offset_data, member.size, labels.get(key, UNLABELLED))
            for key, member in images.items()
        ]
    return entries


def _hub(name: str) -> tuple[Source, Source | None]:
    try:
        import datasets
    except ImportError:
        raise ImportError("hf: needs the library datasets: pip install 'aptvit[data]'") from None
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"cannot load the dataset {name}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(splits, dict):
        splits = {"train": splits}
    train = next(splits[split] for split in (*_TRAIN, *splits) if split in splits)
    evaluation = next((splits[split] for split in _EVAL if split in splits and splits[split] is not train), None)
    return _split(train, name), None if evaluation is None else _split(evaluation, name)


def _split(rows: Any, name: str) -> HubDataset:
    import datasets

    image = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(f"the dataset {name} has no column of images: it has {', '.join(rows.features)}")
    label = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    classes = () if label is None else rows.features[label].names
    return HubDataset(rows.cast_column(image, datasets.Image(decode=False)), image, label, classes, name)
