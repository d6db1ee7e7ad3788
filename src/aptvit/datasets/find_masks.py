"""Find images with masks in the layouts of ADE20K, CamVid, Cityscapes, Pascal VOC and plain parallel folders."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from aptvit.datasets.mask_values import (
    MAX_MASK_PIXELS,
    NO_CLASS,
    ColourTable,
    cityscapes_numbers,
    colour_table,
    find_table,
    read_numbers,
)
from aptvit.datasets.masks import MaskFiles
from aptvit.datasets.splits import Splits, arrange, folders_in, read_parts, resolve, split_of, unwrap
from aptvit.datasets.voc import list_of_voc, voc_lists
from aptvit.files.images import ImageError, find_images, opened
from aptvit.files.text import printable, read_lines, read_text

__all__ = ["find_masks"]

_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit", "rgb")
_MASKS = ("annotations", "annotation", "masks", "mask", "labels", "label", "annot", "gtfine", "segmentationclass", "gt")
_SPLIT_MASKS = re.compile(r"(.*[a-z])[_-]?(annot|annotations|labels|masks?)", re.IGNORECASE)
_SUFFIX = re.compile(
    r"_(mask|masks|label|labels|annotation|seg|segmentation|gt|L|gtFine_labelIds|gtFine_labelTrainIds)$"
)
_IMAGE_SUFFIX = re.compile(r"_(leftImg8bit|image|img|rgb)$")
_MAX_CLASSES = 65_535  # `MaskFiles.no_class` is the next number
_SAMPLE = 64  # masks that are looked at where the number of classes is given
_USUALLY_IGNORED = (255, 65535)  # values that stand for no class in most datasets
_LEAST_USE = 0.1  # share of the numbers up to the greatest that occur, where it is above 50

Folders = tuple[Path, Path]
"""Folder of images, and of masks."""


def find_masks(
    data: Path | str | None,
    num_classes: int | None = None,
    ignore: Sequence[int] = (255,),
    subtract: int = 0,
    train: str | None = None,
    val: str | None = None,
    colours: str | None = None,
) -> tuple[MaskFiles, MaskFiles | None]:
    """Find images with masks: the training split and, if there is one, the evaluation split.

    An image and its mask have the same name in parallel folders: ``images/training`` and ``annotations/training`` as in
    ADE20K, ``train`` and ``trainannot`` as in CamVid, ``train/images`` and ``train/masks``, ``leftImg8bit`` and
    ``gtFine`` of Cityscapes, ``JPEGImages`` and ``SegmentationClass`` with the lists of Pascal VOC, or ``images`` and
    ``masks`` without splits; a mask may end with ``_mask``, ``_label``, ``_seg`` or ``_gt``. ``classes.txt`` names the
    classes, one per line; ``class_dict.csv`` or ``labelmap.txt`` their colours.

    Args:
        data: The folder; None if ``train`` says all.
        num_classes: Number of classes; by default that of the names, or the greatest value in training masks plus one.
        ignore: Values of pixels without a class.
        subtract: 1 if classes are counted from 1 and 0 is no class, as in ADE20K.
        train: Folder of the training split, with images and masks in it, instead of what names say; or a list of
            Pascal VOC.
        val: The same for the evaluation split.
        colours: Colours of the classes: ``"voc"``, ``"cityscapes"``, ``"ade20k"``, or a file.

    Returns:
        Training images, and evaluation images or None.

    Raises:
        ValueError: If there are no images with masks, names are ambiguous, ``num_classes`` differs from the number of
            names, or values of masks have no clear meaning.
    """
    folder = None if data is None else Path(data)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give one with images and masks")
    root = folder if folder is None else unwrap(folder, _is_dataset)
    if train is None:
        if root is None:
            raise ValueError("there is no dataset: name it, or its splits with --train and --val")
        splits = _find(root)
    else:
        splits = Splits(_named(root, train), None)
    if val is not None:
        splits = replace(splits, evaluation=_named(root, val))
    files, evaluation = splits.train, splits.evaluation
    files = replace(files, problems=[*splits.left_out, *files.problems], ignore=frozenset(ignore), subtract=subtract)
    if not files.paths:
        raise ValueError(
            f"{files.origin} has no images with masks of the same names: {_first_problems(files.problems)}"
        )
    files = _with_classes(files, root, num_classes, colours)
    if evaluation is None:
        return files, None
    same = {name: getattr(evaluation, name) for name in ("paths", "masks", "problems", "origin")}
    return files, replace(files, **same)


# Folders


def _is_dataset(folder: Path) -> bool:
    inner = folders_in(folder)
    return _by_words(inner, _MASKS) is not None or any(split_of(path.name) for path in inner)


def _by_words(folders: Iterable[Path], words: Sequence[str]) -> Path | None:
    """The folder that is named by one of the words.

    Raises:
        ValueError: If several folders are.
    """
    chosen = [path for path in folders if path.name.lower() in words]
    if len(chosen) > 1:
        raise ValueError(
            f"{printable(chosen[0].parent)} has {chosen[0].name} and {chosen[1].name}: move away what is not meant"
        )
    return chosen[0] if chosen else None


def _find(root: Path) -> Splits[MaskFiles]:
    inner = folders_in(root)
    images, masks = _by_words(inner, _IMAGES), _by_words(inner, _MASKS)
    if images is not None and masks is not None:
        lists = voc_lists(root, "Segmentation")
        if lists:
            places = images, masks
            return read_parts(arrange(lists, root), lambda path: _pairs_of_list(*places, path))
        pairs = {path: (path, masks / path.name) for path in folders_in(images) if split_of(path.name)}
        if not pairs:
            return Splits(_pair((images, masks)), None)
    else:
        pairs = {path: folders for path in inner if split_of(path.name) and (folders := _of_split(path))}
    if not pairs:
        raise ValueError(
            f"{root} has no images with masks: give images/training and annotations/training, train and "
            "trainannot, train/images and train/masks, or images and masks"
        )
    names = {path: path.name for path in pairs}
    place = images if images is not None and masks is not None else root
    return read_parts(arrange(names, place), lambda path: _pair(pairs[path]))


def _of_split(folder: Path) -> Folders | None:
    """Images and masks of the folder of a split: inside it, or masks in a folder beside it of a longer name."""
    if (match := _SPLIT_MASKS.fullmatch(folder.name)) and split_of(match[1]):
        return None  # the masks of another folder
    inner = folders_in(folder)
    images, masks = _by_words(inner, _IMAGES), _by_words(inner, _MASKS)
    if images is not None and masks is not None:
        return images, masks
    for path in folders_in(folder.parent):
        match = _SPLIT_MASKS.fullmatch(path.name)
        if match and match[1].lower() == folder.name.lower():
            return folder, path
    return folder, folder  # masks beside their images, with an ending of the name


def _named(root: Path | None, value: str) -> MaskFiles:
    """The split that was named: a list of Pascal VOC, or a folder."""
    path = resolve(root, value)
    inner = folders_in(path if path.is_dir() or root is None else root)
    images, masks = _by_words(inner, _IMAGES), _by_words(inner, _MASKS)
    if path.is_file():
        if images is None or masks is None:
            raise ValueError(f"{printable(path)} is a list, and the dataset has no JPEGImages and SegmentationClass")
        return _pairs_of_list(images, masks, path)
    if images is not None and masks is not None:
        return _pair((images, masks))
    outer = path.parent.parent
    neighbours = [place / path.name for place in folders_in(outer) if place.name.lower() in _MASKS]
    existing = [place for place in neighbours if place.is_dir() and place.parent != path.parent]
    folders = (path, existing[0]) if len(existing) == 1 else _of_split(path)
    if folders is None:
        raise ValueError(f"{printable(path)} holds masks: name the folder of their images")
    return _pair(folders)


# Pairs


def _pairs_of_list(images: Path, masks: Path, file: Path) -> MaskFiles:
    names = set(list_of_voc(file))
    files = _pair((images, masks), names)
    return replace(files, origin=str(file))


def _pair(folders: Folders, names: set[str] | None = None) -> MaskFiles:
    """Images of a folder with their masks; what has no partner is listed."""
    images, masks = folders
    by_key: dict[str, list[Path]] = {}
    mask_files = _files(masks)
    is_shared = images == masks
    for path in mask_files:
        key = _key(path, masks)
        stripped = _SUFFIX.sub("", key)
        if not is_shared or stripped != key:
            by_key.setdefault(key, []).append(path)
            if stripped != key:
                by_key.setdefault(stripped, []).append(path)
    taken = {path for paths in by_key.values() for path in paths} if is_shared else set()
    pairs, lonely, used, problems = [], [], set(), []
    for path in _files(images):
        if path in taken:
            continue
        key = _key(path, images)
        if names is not None and key not in names:
            continue
        candidates = by_key.get(key) or by_key.get(_IMAGE_SUFFIX.sub("", key)) or []
        exact = [mask for mask in candidates if _key(mask, masks) == key] or _train_ids(candidates)
        if len(exact) == 1:
            pairs.append((path, exact[0]))
            used.add(exact[0])
        elif exact:
            problems.append(f"{printable(path)}: {exact[0].name} and {exact[1].name} may be the mask")
        else:
            lonely.append(path)
    problems += _lonely(lonely, "image", "mask")
    if names is None:
        images_of_folder = {path for path in mask_files if path not in taken} if is_shared else set()
        unused = [path for path in mask_files if path not in used | images_of_folder and not _is_cityscapes_extra(path)]
        problems += _lonely(unused, "mask", "image")
    else:
        missing = sorted(names - {_key(path, images) for path in _files(images)})
        if missing:
            problems.append(f"names in the list without an image: {len(missing)}, such as {missing[0]}")
    return MaskFiles([path for path, _ in pairs], [mask for _, mask in pairs], problems=problems, origin=str(images))


def _files(folder: Path) -> list[Path]:
    try:
        return find_images([folder])
    except ValueError:
        return []


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _train_ids(candidates: list[Path]) -> list[Path]:
    """Of the masks of an image of Cityscapes, that with the numbers of the classes."""
    chosen = [path for path in candidates if path.stem.endswith("labelTrainIds")]
    return chosen or candidates


def _is_cityscapes_extra(path: Path) -> bool:
    return path.stem.endswith(("_color", "_instanceIds", "_labelIds", "_instanceTrainIds"))


def _lonely(paths: Sequence[Path], kind: str, partner: str) -> list[str]:
    if not paths:
        return []
    subject = f"1 {kind} has" if len(paths) == 1 else f"{len(paths)} {kind}s have"
    return [f"{subject} no {partner}, such as {printable(paths[0])}"]


# Classes


def _with_classes(files: MaskFiles, root: Path | None, num_classes: int | None, colours: str | None) -> MaskFiles:
    """Find out what the values in masks stand for."""
    table = colour_table(colours) if colours else None
    if table is None and root is not None and not _has_numbers(files.masks[0]):
        table = find_table(root)
    names = list(table.names) if isinstance(table, ColourTable) else _names(root)
    numbers: dict[int, int] = {}
    if all(path.stem.endswith("_labelIds") for path in files.masks):
        names, numbers = cityscapes_numbers()
    files = replace(files, names=names, table=table, numbers=numbers)
    number, subtract = num_classes if num_classes is not None else len(names) or None, files.subtract
    if names and num_classes not in (None, len(names)):
        raise ValueError(f"{files.origin} names {len(names)} classes, and there are to be {num_classes}")
    if table is None and not numbers:
        values = _values_in(files.masks[:: 1 if number is None else max(1, len(files) // _SAMPLE)])
        if values == {0, 255}:  # a mask of two classes: 255 alone would be the value to ignore
            files = replace(files, numbers={0: 0, 255: 1}, ignore=frozenset())
            values = {0, 1}
        if number is None:
            classes = {value - subtract for value in values - files.ignore if value >= subtract}
            _check_classes(classes, subtract, files.origin)
            number = 1 + max(classes, default=NO_CLASS)
    elif number is None:
        number = 1 + max(max(_values_in([mask], table), default=NO_CLASS) for mask in files.masks)
    if number > _MAX_CLASSES:
        raise ValueError(f"{printable(files.origin)}: {number:,} classes, more than {_MAX_CLASSES:,}: check the masks")
    if number < 1:
        raise ValueError(f"{files.origin}: no pixel of the training masks has a class: check --ignore and --subtract")
    return replace(files, num_classes=number)


def _check_classes(classes: set[int], subtract: int, origin: str) -> None:
    """Refuse numbers with a gap that no list of classes has: a value without a class, or levels of gray."""
    values = [number + subtract for number in sorted(classes)]
    if not values:
        return
    is_apart = values[-1] in _USUALLY_IGNORED and values[-1] - 1 not in values
    if not is_apart and (values[-1] <= 50 or len(values) >= _LEAST_USE * values[-1]):
        return
    examples = ", ".join(map(str, values if len(values) < 6 else [*values[:3], "...", *values[-2:]]))
    remedy = f"if {values[-1]} is no class, give --ignore {values[-1]}; " if values[-1] in _USUALLY_IGNORED else ""
    raise ValueError(
        f"the masks of {printable(origin)} have the values {examples}: {remedy}if they are classes, number them from 0 "
        "without gaps, or name all of them in classes.txt"
    )


def _has_numbers(path: Path) -> bool:
    try:
        read_numbers(path)
    except ImageError:
        return False
    return True


def _names(root: Path | None) -> list[str]:
    """Names of classes in ``classes.txt``, or in ``_classes.csv`` by the value of the pixels."""
    if root is None:
        return []
    if (root / "classes.txt").is_file():
        return read_lines(root / "classes.txt")
    if (root / "_classes.csv").is_file():
        rows = list(csv.reader(read_text(root / "_classes.csv").splitlines()))[1:]
        rows = [row for row in rows if len(row) > 1 and re.fullmatch("[0-9]{1,6}", row[0].strip())]
        names = {int(row[0]): row[1].strip() for row in rows}
        if sorted(names) == list(range(len(names))):
            return [names[number] for number in range(len(names))]
    return []


def _values_in(masks: Sequence[Path], table: ColourTable | str | None = None) -> set[int]:
    """All values in masks. A file that cannot be read is reported when it is trained on.

    Raises:
        ValueError: If the first mask holds colours, or palettes give the same number different colours: then numbers
            are no classes.
    """
    values: set[int] = set()
    colours: dict[int, tuple[list[int], Path]] = {}
    for path in masks:
        try:
            present = np.unique(read_numbers(path, table)).tolist()
            palette = None if table is not None else _palette(path)
        except ImageError:
            if path == masks[0]:
                raise
            continue
        values.update(present)
        for number in present if palette else []:
            colour = (palette or [])[3 * number : 3 * number + 3]
            before, file = colours.setdefault(number, (colour, path))
            if before != colour:
                raise ValueError(
                    f"{printable(path)} and {printable(file)} give {number} different colours, so numbers in their "
                    "palettes are no classes: name the colours of the classes with --colours"
                )
    return values


def _palette(path: Path) -> list[int] | None:
    with opened(path, MAX_MASK_PIXELS) as image:
        return image.getpalette() if image.mode == "P" else None


def _first_problems(problems: Sequence[str]) -> str:
    return "; ".join(problems[:2]) or "it is empty"
