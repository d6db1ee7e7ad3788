"""Images with boxes or with masks, from folders in the formats of Pascal VOC, COCO, ADE20K and CamVid."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from aptvit.files.images import SUFFIXES, ImageError, open_image

__all__ = ["BoxFiles", "MaskFiles", "find_boxes", "find_masks"]

_TRAIN, _EVAL = ("train", "training", "trainval"), ("val", "validation", "valid", "test")
T = TypeVar("T")


@dataclass(frozen=True)
class BoxFiles:
    """Image files with boxes.

    Attributes:
        paths: The image files.
        boxes: For each image, (n, 4) corners x1, y1, x2, y2 in pixels; n may be 0.
        labels: For each image, (n,) numbers of classes.
        classes: Names of the classes.
        problems: Messages about annotations that were left out.
        outlines: For each image, the outline of the object in each box in COCO's format: polygons or run lengths;
            empty if there are no outlines.
    """

    paths: Sequence[Path]
    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    classes: Sequence[str]
    problems: Sequence[str] = ()
    outlines: Sequence[Sequence[Any]] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Name of an image for messages."""
        return str(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, Tensor, Tensor]:
        """Read an image with its boxes.

        Args:
            index: Number of the image.

        Returns:
            The upright RGB image, (n, 4) boxes clipped to the image, and (n,) numbers of classes.

        Raises:
            ImageError: If the image cannot be read.
        """
        image = open_image(self.paths[index])
        boxes, is_valid = self._inside(index, image.width, image.height)
        return image, boxes[is_valid], self.labels[index][is_valid]

    def _inside(self, index: int, width: int, height: int) -> tuple[Tensor, Tensor]:
        """Boxes clipped to the image, and which of them are at least a pixel wide and high."""
        boxes = self.boxes[index].clone()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        return boxes, (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)

    def masks(self, index: int, width: int, height: int) -> Tensor:
        """Masks of the objects in the boxes of `load`.

        Args:
            index: Number of the image.
            width: Width of the image in pixels.
            height: Height of the image in pixels.

        Returns:
            (n, H, W) uint8, 1 inside the object.

        Raises:
            ImageError: If an outline cannot be read.
        """
        _, is_valid = self._inside(index, width, height)
        masks = [
            _fill(outline, width, height, self.name(index))
            for outline, kept in zip(self.outlines[index], is_valid.tolist(), strict=True)
            if kept
        ]
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)

    def only(self, index: Iterable[int]) -> BoxFiles:
        """The images of these numbers."""
        chosen = list(index)
        return replace(
            self,
            paths=[self.paths[i] for i in chosen],
            boxes=[self.boxes[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            outlines=[self.outlines[i] for i in chosen] if self.outlines else (),
        )


def _fill(outline: Any, width: int, height: int, name: str) -> np.ndarray:
    """(H, W) uint8 mask of an object, from polygons x1, y1, x2, y2, ... or run lengths in column-major order."""
    try:
        if isinstance(outline, dict):
            counts = outline["counts"]
            if isinstance(counts, str):
                counts = _run_lengths(counts)
            rows, cols = outline["size"]
            inside = np.repeat(np.arange(len(counts)) % 2, counts)
            if (rows, cols) != (height, width) or inside.size != rows * cols:
                raise ImageError(f"{name}: an outline is of {cols}x{rows} pixels, the image of {width}x{height}")
            return inside.reshape(cols, rows).T.astype(np.uint8)
        canvas = Image.new("L", (width, height))
        for polygon in outline:
            ImageDraw.Draw(canvas).polygon([float(coordinate) for coordinate in polygon], fill=1, outline=1)
        return np.asarray(canvas)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: an outline is neither polygons nor run lengths ({error})") from None


def _run_lengths(packed: str) -> list[int]:
    """Decode COCO's compressed run lengths: five bits per character, from the third number on differences."""
    counts: list[int] = []
    position = 0
    while position < len(packed):
        value, shift, more = 0, 0, True
        while more:
            letter = ord(packed[position]) - 48
            value |= (letter & 0x1F) << shift
            more = bool(letter & 0x20)
            position, shift = position + 1, shift + 5
        if letter & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


@dataclass(frozen=True)
class MaskFiles:
    """Image files with masks: a class for each pixel.

    Attributes:
        paths: The image files.
        masks: Mask files, gray or with a palette; a pixel's value is its class.
        num_classes: Number of classes; larger values are an error, except values to ignore.
        ignore: Values of pixels without a class.
        subtract: Number of the first class in the files: 1 for ADE20K, where 0 is no class, else 0.
        names: Names of the classes; empty for their numbers.
    """

    paths: Sequence[Path]
    masks: Sequence[Path]
    num_classes: int = 0
    ignore: frozenset[int] = field(default_factory=lambda: frozenset((255,)))
    subtract: int = 0
    names: Sequence[str] = ()

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.names) or [str(number) for number in range(self.num_classes)]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Name of an image for messages."""
        return str(self.paths[index])

    def read_mask(self, index: int) -> np.ndarray:
        """(H, W) int64 values in a mask file.

        Raises:
            ImageError: If the file cannot be read, or has colours instead of numbers.
        """
        path = self.masks[index]
        try:
            with Image.open(path) as mask:
                if mask.mode not in ("L", "P", "I", "I;16", "1"):
                    raise ImageError(f"{path}: a mask holds numbers of classes, this one has colours ({mask.mode})")
                return np.array(mask).astype(np.int64)
        except ImageError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise ImageError(f"{path}: {' '.join(str(error).split())}") from None

    def load(self, index: int) -> tuple[Image.Image, Tensor]:
        """Read an image with its mask.

        Args:
            index: Number of the image.

        Returns:
            The upright RGB image, and (H, W) int64 classes, 255 for pixels without a class.

        Raises:
            ImageError: If a file cannot be read, sizes differ, or the mask has a class that does not exist.
        """
        image, numbers = open_image(self.paths[index]), self.read_mask(index)
        if numbers.shape != (image.height, image.width):
            height, width = numbers.shape
            raise ImageError(
                f"{self.masks[index]}: the mask has {width}x{height} pixels, the image {image.width}x{image.height}"
            )
        ignored = np.isin(numbers, list(self.ignore))
        classes = numbers - self.subtract
        ignored |= classes < 0
        outside = ~ignored & (classes >= self.num_classes)
        if self.num_classes and outside.any():
            raise ImageError(
                f"{self.masks[index]}: label {int(numbers[outside][0])} is out of range, there are {self.num_classes} "
                "classes; name more classes, or ignore it"
            )
        classes[ignored] = 255
        return image, torch.from_numpy(classes)

    def only(self, index: Iterable[int]) -> MaskFiles:
        """The images of these numbers."""
        chosen = list(index)
        return replace(self, paths=[self.paths[i] for i in chosen], masks=[self.masks[i] for i in chosen])


# Boxes


def find_boxes(data: Path | str) -> tuple[BoxFiles, BoxFiles | None]:
    """Find images with boxes: the training split and, if there is one, the evaluation split.

    Formats are Pascal VOC (``JPEGImages/``, ``Annotations/*.xml``, ``ImageSets/Main/*.txt`` if there are splits) and
    COCO (a JSON file, or a folder with ``annotations/instances_train*.json`` and ``..._val*.json``, or with
    ``annotations.json``; images in ``images/``, ``train*/``, ``val*/`` or beside the file).

    Args:
        data: The folder, or COCO's JSON file.

    Returns:
        Training images, and evaluation images or None.

    Raises:
        ValueError: If the format is another one, or there are no boxes.
    """
    folder = Path(data)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: give a folder in Pascal VOC's or COCO's form, or COCO's JSON file")
    if (folder / "Annotations").is_dir():
        train, evaluation = _find_voc(folder)
    else:
        train, evaluation = _find_coco(folder)
    if not any(len(boxes) for boxes in train.boxes):
        raise ValueError(f"{folder} has no boxes to train on: check that its annotations name its images")
    return train, evaluation


def _find_voc(folder: Path) -> tuple[BoxFiles, BoxFiles | None]:
    parsed = {path.stem: _read_voc(path) for path in sorted((folder / "Annotations").glob("*.xml"))}
    classes = sorted({name for objects in parsed.values() for name, _ in objects})
    lists = {path.stem: path for path in sorted((folder / "ImageSets").rglob("*.txt"))}
    train = next((lists[name] for name in _TRAIN if name in lists), None)
    evaluation = next((lists[name] for name in _EVAL if name in lists), None)
    files = _voc_files(folder, list(parsed), parsed, classes)
    if train is None:
        return files, None
    parts = [
        None
        if names is None
        else _voc_files(
            folder, [line.split()[0] for line in names.read_text().split("\n") if line.strip()], parsed, classes
        )
        for names in (train, evaluation)
    ]
    assert parts[0] is not None
    return parts[0], parts[1]


def _read_voc(path: Path) -> list[tuple[str, list[float]]]:
    """Class names and corners of the boxes in a file of Pascal VOC, where pixels are counted from 1."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = []
        for element in root.iter("object"):
            corners = [float(element.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")]
            objects.append((element.findtext("name") or "object", [corners[0] - 1, corners[1] - 1, *corners[2:]]))
        return objects
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is no annotation in Pascal VOC's form: {error}") from None


def _voc_files(folder: Path, stems: Sequence[str], parsed: dict[str, Any], classes: Sequence[str]) -> BoxFiles:
    images = {path.stem: path for path in (folder / "JPEGImages").iterdir() if path.suffix.lower() in SUFFIXES}
    rows, problems = [], []
    for stem in stems:
        if stem not in images or stem not in parsed:
            problems.append(f"{stem}: no {'image' if stem not in images else 'annotation'}")
            continue
        objects = [(corners, classes.index(name), None) for name, corners in parsed[stem]]
        rows.append((images[stem], objects))
    return _box_files(rows, classes, problems)


def _find_coco(folder: Path) -> tuple[BoxFiles, BoxFiles | None]:
    if folder.is_file():
        return _coco_files(folder), None
    files = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])
    boxed = [path for path in files if "caption" not in path.name and "keypoint" not in path.name]
    train = next((path for path in boxed if any(word in path.stem for word in _TRAIN)), None)
    evaluation = next((path for path in boxed if any(word in path.stem for word in _EVAL)), None)
    if train is None:
        if len(boxed) != 1:
            raise ValueError(
                f"{folder} is in no known format: give Pascal VOC's (Annotations/, JPEGImages/), or COCO's (one JSON "
                f"file, or one with train and one with val in its name); there are {len(boxed)} JSON files"
            )
        return _coco_files(boxed[0]), None
    return _coco_files(train), None if evaluation is None else _coco_files(evaluation)


def _coco_files(file: Path) -> BoxFiles:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        categories = sorted(record["categories"], key=lambda entry: entry["id"])
        number = {entry["id"]: i for i, entry in enumerate(categories)}
        names = {entry["id"]: entry["file_name"] for entry in record["images"]}
        objects: dict[Any, list] = {image: [] for image in names}
        problems = []
        for entry in record["annotations"]:
            if entry.get("iscrowd"):
                continue
            if entry["image_id"] not in objects or entry["category_id"] not in number:
                problems.append(f"annotation {entry.get('id')}: names an image or a category that is not there")
                continue
            x, y, width, height = entry["bbox"]
            corners = [x, y, x + width, y + height]
            objects[entry["image_id"]].append(
                (corners, number[entry["category_id"]], entry.get("segmentation") or None)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not in COCO's form: {type(error).__name__} {error}") from None
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    places = [file.parent, root, root / "images", *sorted(path for path in root.iterdir() if path.is_dir())]
    places += sorted(path for path in (root / "images").glob("*") if path.is_dir())
    rows = []
    for image, name in names.items():
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is None:
            problems.append(f"{name}: no such image near {file}")
        else:
            rows.append((path, objects[image]))
    return _box_files(rows, [entry["name"] for entry in categories], problems)


def _box_files(rows: Sequence[tuple[Path, list]], classes: Sequence[str], problems: list[str]) -> BoxFiles:
    """Assemble `BoxFiles` from (path, [(corners, class, outline)]), without boxes that have no area."""
    boxes, labels, outlines = [], [], []
    for path, objects in rows:
        valid = []
        for corners, label, outline in objects:
            if corners[2] - corners[0] >= 1 and corners[3] - corners[1] >= 1:  # also false for NaN
                valid.append((corners, label, outline))
            else:
                problems.append(f"{path.name}: a box of {[round(corner, 1) for corner in corners]} has no area")
        boxes.append(torch.tensor([corners for corners, _, _ in valid], dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.tensor([label for _, label, _ in valid], dtype=torch.int64))
        outlines.append([outline for _, _, outline in valid])
    whole = all(outline is not None for objects in outlines for outline in objects)
    return BoxFiles([path for path, _ in rows], boxes, labels, classes, problems, outlines if whole else ())


# Masks


def find_masks(
    data: Path | str, num_classes: int | None = None, ignore: Sequence[int] = (255,), subtract: int = 0
) -> tuple[MaskFiles, MaskFiles | None]:
    """Find images with masks: the training split and, if there is one, the evaluation split.

    An image and its mask have the same name in parallel folders: ``images/training`` and ``annotations/training`` as in
    ADE20K, ``train`` and ``trainannot`` as in CamVid, ``train/images`` and ``train/masks``, or ``images`` and ``masks``
    without splits. A file ``classes.txt`` names the classes, one per line.

    Args:
        data: The folder.
        num_classes: Number of classes; by default that of the names, or the greatest value in training masks plus one.
        ignore: Values of pixels without a class.
        subtract: 1 if classes are counted from 1 and 0 is no class, as in ADE20K.

    Returns:
        Training images, and evaluation images or None.

    Raises:
        ValueError: If there are no images with masks, or ``num_classes`` differs from the number of names.
    """
    folder = Path(data)
    train = _first(_mask_pairs(folder, split) for split in (*_TRAIN, ""))
    if train is None:
        raise ValueError(
            f"{folder} has no images with masks: give images/training and annotations/training, train and "
            "trainannot, train/images and train/masks, or images and masks"
        )
    evaluation = _first(_mask_pairs(folder, split) for split in _EVAL)
    names_file = folder / "classes.txt"
    names = (
        [line.strip() for line in names_file.read_text().splitlines() if line.strip()] if names_file.is_file() else []
    )
    files = MaskFiles(*train, ignore=frozenset(ignore), subtract=subtract, names=names)
    if num_classes is None and names:
        num_classes = len(names)
    elif num_classes is None:
        numbers = [files.read_mask(i) for i in range(len(files))]
        kept = [mask[~np.isin(mask, list(files.ignore))] for mask in numbers]
        num_classes = max((int(mask.max()) for mask in kept if mask.size), default=-1) + 1 - subtract
    if names and num_classes != len(names):
        raise ValueError(f"{names_file} names {len(names)} classes, and there are to be {num_classes}")
    files = replace(files, num_classes=num_classes)
    if evaluation is None:
        return files, None
    return files, replace(files, paths=evaluation[0], masks=evaluation[1])


def _first(candidates: Iterable[T | None]) -> T | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


def _mask_pairs(folder: Path, split: str) -> tuple[list[Path], list[Path]] | None:
    """Images of a split that have a mask, and their masks."""
    names = ("annotations", "masks", "labels", "annot", "mask")
    places = [(folder / "images" / split, folder / name / split) for name in names]
    if split:
        places += [(folder / split / "images", folder / split / name) for name in names]
        places += [(folder / split, folder / f"{split}{suffix}") for suffix in ("annot", "_labels", "_masks", "masks")]
    for images, masks in places:
        if not (images.is_dir() and masks.is_dir()):
            continue
        by_stem = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in SUFFIXES}
        paired = sorted(
            (path, by_stem[path.stem])
            for path in images.iterdir()
            if path.suffix.lower() in SUFFIXES and path.stem in by_stem
        )
        if paired:
            return [image for image, _ in paired], [mask for _, mask in paired]
    return None
