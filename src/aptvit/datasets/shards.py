"""Images in tar shards, by the rules of webdataset for keys, endings and several members of a sample.

webdataset itself reads shards as streams. Here their headers are read once, for access by number: each epoch has its
own order over all shards, and an interrupted training continues where it was.
"""

from __future__ import annotations

import importlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image

from aptvit.datasets.sources import MAX_CLASSES, UNLABELLED, CountsClasses
from aptvit.datasets.splits import Splits, arrange
from aptvit.files.images import SUFFIXES, ImageError, open_image
from aptvit.files.regular import check_end_of_tar, open_regular, read_part
from aptvit.files.text import printable, read_lines

__all__ = ["find_shards", "is_shards", "read_shards"]

_MAX_LABEL = 10_000_000  # bytes
_LABELS = ("cls", "json")
_FIRST = ("jpg", "jpeg", "png", "webp")  # the image of a sample with several, as webdataset's own examples take it


@dataclass(frozen=True)
class Shards(CountsClasses):
    """Images of tar files, ``KEY.jpg`` beside ``KEY.cls`` (a number or a name) or ``KEY.json`` with a "label".

    Attributes:
        entries: For each image: shard, member, offset, size, class.
        classes: Names of the classes.
        problems: Messages about what was left out.
        origin: Where the images are from.
    """

    entries: Sequence[tuple[str, str, int, int, int]]
    classes: Sequence[str] = ()
    problems: Sequence[str] = ()
    origin: str = ""

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return printable(f"{self.entries[index][0]}:{self.entries[index][1]}")

    def label(self, index: int) -> int:
        return self.entries[index][4]

    def load(self, index: int) -> tuple[Image.Image, int]:
        shard, _, offset, size, label = self.entries[index]
        try:
            content = read_part(shard, offset, size)
        except OSError as error:
            raise ImageError(f"{self.name(index)}: {error.strerror or error}") from None
        return open_image(self.name(index), data=content), label

    def relabelled(self, labels: Sequence[int], classes: Sequence[str]) -> Shards:
        entries = [(*entry[:4], label) for entry, label in zip(self.entries, labels, strict=True)]
        return replace(self, entries=entries, classes=classes)


def is_shards(data: str) -> bool:
    """Whether a path, a pattern or a folder is one of tar shards.

    Raises:
        ValueError: If a folder holds both shards and images.
    """
    if not Path(data).is_dir():
        return data.lower().endswith((".tar", ".tar}", ".tar.gz", ".tgz"))
    tars = _tars(Path(data))
    if not tars:
        return False
    image = next((path for path in Path(data).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()), None)
    if image is not None and not image.name.startswith("."):
        raise ValueError(
            f"{printable(data)} holds {len(tars)} tar files, such as {printable(tars[0].name)}, beside images, such as "
            f"{printable(image.name)}: name the shards as '{printable(data)}/*.tar', or move them away"
        )
    return True


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".tar" and not path.is_dir())


def find_shards(data: str) -> Splits[Shards]:
    """Find the splits of shards: files or folders are named after them.

    Args:
        data: A folder of ``*.tar`` files, or a pattern with ``*`` or ``{000..009}``.

    Raises:
        ValueError: If there are no shards, their names are ambiguous, or one is no tar file.
    """
    root = Path(data)
    files = _files(data)
    base = root if root.is_dir() else files[0].parent
    names = {
        file: (file.relative_to(base) if base in file.parents else Path(file.name)).with_suffix("").as_posix()
        for file in files
    }
    splits = arrange(names, data, several=True)
    train = _entries(splits.train)
    evaluation = _entries(splits.evaluation) if splits.evaluation else None
    names_file = base / "classes.txt"
    labels = [label for part in (train, evaluation) if part for *_, label in part[0]]
    classes = read_lines(names_file) if names_file.is_file() else _class_names(labels)
    origins = [_origin(part) for part in (splits.train, splits.evaluation or [])]
    held = None if evaluation is None else _numbered(evaluation, classes, origins[1])
    return Splits(_numbered(train, classes, origins[0]), held, splits.left_out)


def _origin(files: Sequence[Path]) -> str:
    return f"{files[0]}, ... ({len(files)} shards)" if len(files) > 1 else "".join(map(str, files))


def read_shards(data: str) -> Shards:
    """Read shards as a single split.

    Args:
        data: As for `find_shards`.

    Raises:
        ValueError: As for `find_shards`.
    """
    part = _entries(_files(data))
    return _numbered(part, _class_names([label for *_, label in part[0]]), data)


def _files(data: str) -> list[Path]:
    root = Path(data)
    return _tars(root) if root.is_dir() else [Path(file) for file in _expand(data)]


def _expand(pattern: str) -> list[str]:
    """Files that match a pattern on this machine."""
    if pattern.lower().endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{pattern}: images in compressed archives cannot be read by number: unpack it to .tar")
    patterns = [pattern]
    if "{" in pattern:
        patterns = _library("shardlists").expand_urls(pattern)
    files = [file for word in patterns for file in sorted(glob(word))]
    if not files:
        raise ValueError(f"no shards match {pattern}: give a folder of *.tar files on this machine, or a pattern")
    return files


def _library(module: str) -> Any:
    try:
        return importlib.import_module(f"webdataset.{module}")
    except ImportError:
        raise ImportError("shards need the library webdataset: pip install 'aptvit[data]'") from None


Entry = tuple[str, str, int, int, Any]


def _entries(files: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """Images of tar files with their labels as they are told, and messages about what was left out."""
    entries: list[Entry] = []
    problems: list[str] = []
    for file in files:
        try:
            with open_regular(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                samples = _samples(tar, file, problems)
                check_end_of_tar(tar, stream)
        except (tarfile.TarError, OSError, ValueError) as error:
            if isinstance(error, ValueError) and printable(file) in str(error):
                raise
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{printable(file)} is no shard of images and labels: {reason}") from None
        for images, labels in samples.values():
            entries += _of_sample(str(file), images, labels, problems)
    if not entries:
        raise ValueError(f"no images in {printable(files[0])}: shards hold KEY.jpg beside KEY.cls")
    return entries, problems


Members = dict[str, tarfile.TarInfo]


def _samples(tar: tarfile.TarFile, file: Path, problems: list[str]) -> dict[str, tuple[Members, dict[str, Any]]]:
    """Images by ending, and labels by ending, of each key. The key ends at the first dot of the name."""
    split_key = _library("tariterators").base_plus_ext
    samples: dict[str, tuple[Members, dict[str, Any]]] = {}
    unread: Counter[str] = Counter()
    for member in tar:
        if not member.isfile() or member.name.rpartition("/")[2].startswith((".", "__")):
            continue
        key, endings = split_key(member.name)
        last = endings.rpartition(".")[2].lower() if endings else ""
        images, labels = samples.setdefault(key or member.name, ({}, {}))
        if endings in images or endings in labels:
            problems.append(f"{printable(file)}: {printable(member.name)} is there twice, the first is taken")
        elif f".{last}" in SUFFIXES:
            images[endings] = member
        elif last in _LABELS:
            content = tar.extractfile(member)
            text = content.read(_MAX_LABEL + 1) if content else b""
            labels[endings] = _label(text, last, f"{file}:{member.name}")
        else:
            unread[last or member.name] += 1
    without = [key for key, (images, labels) in samples.items() if labels and not images]
    if without:
        subject = "1 label has" if len(without) == 1 else f"{len(without)} labels have"
        problems.append(f"{printable(file)}: {subject} no image, such as that of {printable(without[0])}")
    problems += [
        f"{printable(file)}: {count} members .{printable(last)} are not read" for last, count in unread.items()
    ]
    return samples


def _label(content: bytes, ending: str, name: str) -> Any:
    """Label in a member: a number, a name, or `UNLABELLED`."""
    try:
        if len(content) > _MAX_LABEL:
            raise ValueError(f"it has more than {_MAX_LABEL:,} bytes")
        value: Any = content.decode("utf-8-sig").strip()
        if ending == "json":
            record = json.loads(value)
            value = record.get("label", UNLABELLED) if isinstance(record, dict) else UNLABELLED
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(name)} is no label: {error}") from None
    if value is None or value == "":
        return UNLABELLED
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{printable(name)} is no label: it must be a number or a name, not {value!r}"[:300])
    if not re.fullmatch("-?[0-9]+", str(value)):
        return value
    if len(str(value)) > 9 or int(value) >= MAX_CLASSES:
        raise ValueError(f"{printable(name)} is no label: {str(value)[:20]} is above {MAX_CLASSES:,}")
    return max(int(value), UNLABELLED)


def _of_sample(shard: str, images: Members, labels: dict[str, Any], problems: list[str]) -> list[Entry]:
    """The images of a sample: each that has a label of the same name, or the first."""

    def stem(endings: str) -> str:
        return endings.rpartition(".")[0].lower()

    by_stem: dict[str, Any] = {stem(endings): label for endings, label in sorted(labels.items(), reverse=True)}
    # A plain ending comes first, then the usual ones of photographs: x.png beside x.jpg is a mask.
    order = sorted(images, key=lambda endings: (stem(endings), _rank(endings)))
    chosen: dict[str, str] = {}
    for endings in order:
        if stem(endings) in by_stem or not any(stem(other) in by_stem for other in order):
            chosen.setdefault(stem(endings) if stem(endings) in by_stem else "", endings)
    if not chosen and order:
        chosen[""] = order[0]
    left_out = [endings for endings in order if endings not in chosen.values()]
    problems += [
        f"{printable(shard)}: {printable(images[endings].name)} is a further image of its sample"
        for endings in left_out
    ]
    shared = next(iter(by_stem.values()), UNLABELLED) if len(chosen) == 1 else UNLABELLED
    members = [(images[endings], by_stem.get(stem(endings), shared)) for endings in chosen.values()]
    return [(shard, member.name, member.offset_data, member.size, label) for member, label in members]


def _rank(endings: str) -> tuple[int, str]:
    last = endings.rpartition(".")[2].lower()
    return (_FIRST.index(last) if last in _FIRST else len(_FIRST), last)


def _class_names(labels: Sequence[Any]) -> list[str]:
    """Names of the classes: numbers up to the greatest, or the sorted names.

    Raises:
        ValueError: If some labels are numbers and others names.
    """
    names = sorted({label for label in labels if isinstance(label, str)})
    greatest = max((label for label in labels if not isinstance(label, str)), default=UNLABELLED)
    if names and greatest >= 0:
        raise ValueError(f"labels are numbers, such as {greatest}, and names, such as {names[0]!r}: use one kind")
    return names or [str(number) for number in range(greatest + 1)]


def _numbered(part: tuple[list[Entry], list[str]], classes: Sequence[str], data: str) -> Shards:
    """The images with labels as numbers of classes.

    Raises:
        ValueError: If a label is not among the classes.
    """
    entries, problems = part
    numbers: dict[Any, int] = {name: i for i, name in enumerate(classes)}
    numbers |= {i: i for i in range(len(classes))} | {UNLABELLED: UNLABELLED}
    unknown = next((label for *_, label in entries if label not in numbers), None)
    if unknown is not None:
        raise ValueError(f"{printable(data)} has the label {unknown!r}, which is none of the {len(classes)} classes")
    rows = [(shard, name, offset, size, numbers[label]) for shard, name, offset, size, label in entries]
    return Shards(rows, list(classes), problems, data)
