"""Images in a folder for each class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aptvit.datasets.sources import Files
from aptvit.datasets.splits import Splits, arrange, folders_in, split_of, unwrap
from aptvit.files.images import find_images
from aptvit.files.text import printable

__all__ = ["find_folders", "read_folder"]


def find_folders(root: Path, labelled: bool) -> Splits[Files]:
    """Find the splits of a folder: a folder for each, with a folder for each class in it.

    Args:
        root: The folder.
        labelled: Whether classes are needed; without classes any folder of images is valid.

    Raises:
        ValueError: If there are no images, or it is ambiguous which belong to a split.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: give a folder of images, *.tar shards, or hf:NAME")
    folder = unwrap(root, _is_dataset)
    folders = folders_in(folder)
    splits = arrange({path: path.name for path in folders}, folder, is_content=_has_images)
    if any(split_of(path.name) for path in splits.train):
        train = read_folder(splits.train[0], labelled)
        evaluation = read_folder(splits.evaluation[0], labelled) if splits.evaluation else None
        loose = [path for path in find_images([folder]) if path.parent == folder]
        left_out = splits.left_out
        if loose:
            left_out += (f"{len(loose)} images beside the folders of the splits, such as {printable(loose[0])}",)
        return Splits(train, evaluation, left_out)
    inner = {path: path.name for outer in folders for path in folders_in(outer)}
    if inner and all(split_of(name) for name in inner.values()):
        return _splits_of_classes(folder, inner, labelled)
    return Splits(read_folder(folder, labelled), None)


def _is_dataset(folder: Path) -> bool:
    folders = folders_in(folder)
    return len(folders) > 1 or any(split_of(path.name) for path in folders)


def _has_images(folder: Path) -> bool:
    try:
        return bool(find_images([folder]))
    except ValueError:
        return False


def _splits_of_classes(folder: Path, inner: dict[Path, str], labelled: bool) -> Splits[Files]:
    """The splits of a folder for each class with folders of the splits in each."""
    splits = arrange(inner, folder, several=True)
    evaluation = _files(folder, find_images(splits.evaluation), labelled) if splits.evaluation else None
    return Splits(_files(folder, find_images(splits.train), labelled), evaluation, splits.left_out)


def read_folder(root: Path, labelled: bool) -> Files:
    """Read a folder with a folder for each class, whatever they are named.

    Args:
        root: The folder.
        labelled: Whether classes are needed.

    Raises:
        ValueError: If there are no images.
    """
    return _files(root, find_images([root]), labelled)


def _files(root: Path, paths: Sequence[Path], labelled: bool) -> Files:
    if not labelled:
        return Files(paths, origin=str(root))
    inside = [path for path in paths if len(path.relative_to(root).parts) > 1]
    names = [path.relative_to(root).parts[0] for path in inside]
    classes = sorted(set(names))
    problems = []
    if len(inside) < len(paths):
        example = next(path for path in paths if path.parent == root)
        problems.append(f"{len(paths) - len(inside)} images are in no folder of a class, such as {printable(example)}")
    empty = [path.name for path in folders_in(root) if path.name not in set(names)]
    problems += [f"{printable(root / name)} holds no images" for name in empty]
    numbers = {name: i for i, name in enumerate(classes)}
    return Files(inside, [numbers[name] for name in names], [printable(name) for name in classes], problems, str(root))
