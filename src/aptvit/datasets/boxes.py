"""Images with boxes around objects, as all readers of boxes return them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.datasets.mask_values import MAX_MASK_PIXELS
from aptvit.datasets.placement import Placement, place
from aptvit.datasets.splits import by_name
from aptvit.files.images import ImageError, open_image, turn_of
from aptvit.files.text import printable

__all__ = ["BoxFiles", "ImageObjects", "Objects", "collect"]

_MAX_CLASSES = 20_000  # the largest sets of boxes have 13,000
_MAX_LENGTH = 1e6  # of the polygons of an object, in pixels


@dataclass
class Objects:
    """The objects of an image as its annotation has them, before they are placed in the upright image.

    Attributes:
        path: The image file.
        size: Width and height that the annotation tells; None if it tells nothing.
        boxes: Corners x1, y1, x2, y2 of each object.
        labels: Number of the class of each object.
        crowd: Whether each box is around a crowd.
        areas: Area of each object in pixels of the annotation; NaN for that of the box.
        outlines: Outline of each object in COCO's format, or None.
    """

    path: Path
    size: tuple[int, int] | None = None
    boxes: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    outlines: list[Any] = field(default_factory=list)

    def add(
        self, box: Sequence[float], label: int, crowd: bool = False, area: float = np.nan, outline: Any = None
    ) -> str:
        """Add an object.

        Args:
            box: Corners x1, y1, x2, y2.
            label: Number of the class.
            crowd: Whether the box is around a crowd.
            area: Area in pixels.
            outline: Outline in COCO's format.

        Returns:
            Why the object is left out, or an empty string.
        """
        corners = [float(corner) for corner in box]
        if len(corners) != 4 or not (
            np.isfinite(corners).all() and corners[2] > corners[0] and corners[3] > corners[1]
        ):
            return f"{printable(self.path.name)}: a box of {[round(corner, 1) for corner in corners]} has no area"
        self.boxes.append(corners)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.areas.append(area)
        self.outlines.append(outline)
        return ""


@dataclass(frozen=True)
class ImageObjects:
    """An image with all of its objects, placed in the upright image.

    Attributes:
        image: The upright RGB image.
        boxes: (n, 4) corners x1, y1, x2, y2 in pixels, not clipped to the image.
        labels: (n,) numbers of classes.
        crowd: (n,) bool, whether a box is around a crowd, which COCO's evaluation ignores.
        areas: (n,) areas in pixels.
    """

    image: Image.Image
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor


@dataclass(frozen=True)
class BoxFiles:
    """Image files with boxes.

    Attributes:
        paths: The image files.
        boxes: For each image, (n, 4) corners x1, y1, x2, y2 in pixels of the annotation, or as shares of the sides of
            the image; n may be 0.
        labels: For each image, (n,) numbers of classes.
        classes: Names of the classes.
        problems: Messages about what was left out.
        outlines: For each image, the outline of the object in each box in COCO's format: polygons or run lengths;
            empty if there are no outlines.
        crowd: For each image, (n,) bool, whether a box is around a crowd; empty for none.
        areas: For each image, (n,) areas in pixels of the annotation; empty for those of the boxes.
        sizes: For each image, width and height that the annotation tells, or None; empty for none.
        relative: Whether coordinates are shares of the sides of the image.
        origin: Where the images are from.
    """

    paths: Sequence[Path]
    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    classes: Sequence[str]
    problems: Sequence[str] = ()
    outlines: Sequence[Sequence[Any]] = ()
    crowd: Sequence[Tensor] = ()
    areas: Sequence[Tensor] = ()
    sizes: Sequence[tuple[int, int] | None] = ()
    relative: bool = False
    origin: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Name of an image for messages."""
        return printable(self.paths[index])

    def load(self, index: int) -> tuple[Image.Image, Tensor, Tensor]:
        """Read an image with its boxes, for training: without crowds.

        Args:
            index: Number of the image.

        Returns:
            The upright RGB image, (n, 4) boxes clipped to the image, and (n,) numbers of classes.

        Raises:
            ImageError: If the image cannot be read, or its size does not fit the annotation.
        """
        image = open_image(self.paths[index])
        boxes, is_kept = self._trained(index, image.size)
        return image, boxes[is_kept], self.labels[index][is_kept]

    def load_objects(self, index: int) -> ImageObjects:
        """Read an image with all of its objects, for evaluation.

        Args:
            index: Number of the image.

        Raises:
            ImageError: As for `load`.
        """
        image = open_image(self.paths[index])
        placement, boxes = self._placed(index, image.size)
        scale = image.width * image.height / (placement.frame[0] * placement.frame[1])
        areas = self.areas[index] * scale if self.areas else torch.full((len(boxes),), torch.nan)
        areas = torch.where(areas.isnan(), (boxes[:, 2:] - boxes[:, :2]).prod(1), areas)
        return ImageObjects(image, boxes, self.labels[index], self._crowd(index), areas)

    def _placed(self, index: int, size: tuple[int, int]) -> tuple[Placement, Tensor]:
        """How annotations lie in an upright image of this size, and its boxes in pixels."""
        annotated = self.sizes[index] if self.sizes and not self.relative else None
        placement = place(self.name(index), annotated, size, turn_of(self.paths[index]) if annotated else None)
        boxes = placement.boxes(self.boxes[index])
        return placement, boxes * torch.tensor([*size, *size]) if self.relative else boxes

    def _crowd(self, index: int) -> Tensor:
        return self.crowd[index] if self.crowd else torch.zeros(len(self.labels[index]), dtype=torch.bool)

    def _trained(self, index: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes clipped to the image, and which of them are no crowds and at least a pixel wide and high."""
        boxes = self._placed(index, size)[1].clone()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, size[0])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, size[1])
        return boxes, (boxes[:, 2:] - boxes[:, :2] >= 1).all(1) & ~self._crowd(index)

    def masks(
        self, index: int, width: int, height: int, crowds: bool = False, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Masks of the objects in the boxes of `load`.

        Args:
            index: Number of the image.
            width: Width of the upright image in pixels.
            height: Height of the upright image in pixels.
            crowds: Masks of all objects instead, those of `load_objects`.
            size: Width and height to resize each to; those of the image by default.

        Returns:
            (n, H, W) uint8, 1 inside the object.

        Raises:
            ImageError: If an outline cannot be read.
        """
        placement, boxes = self._placed(index, (width, height))
        is_kept = torch.ones(len(boxes), dtype=torch.bool) if crowds else self._trained(index, (width, height))[1]
        width, height = size = size or (width, height)
        masks = [
            _resized(placement.mask(_fill(outline, placement.frame, self.relative, self.name(index))), size)
            for outline, kept in zip(self.outlines[index], is_kept.tolist(), strict=True)
            if kept
        ]
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)

    def only(self, index: Iterable[int], origin: str = "") -> BoxFiles:
        """The images of these numbers.

        Args:
            index: The numbers.
            origin: Where they are from; by default as before.
        """
        chosen = list(index)
        values: dict[str, Any] = {
            name: [getattr(self, name)[i] for i in chosen] if len(getattr(self, name)) else ()
            for name in ("paths", "boxes", "labels", "outlines", "crowd", "areas", "sizes")
        }
        return replace(self, **values, origin=origin or self.origin)

    def with_classes(self, classes: Sequence[str]) -> BoxFiles:
        """The same images with classes numbered as in another list, by name.

        Args:
            classes: Names of the classes of the training split.

        Raises:
            ValueError: If there are objects of a class that is not in the list.
        """
        used = sorted({int(label) for labels in self.labels for label in labels})
        numbers = by_name([self.classes[number] for number in used], classes, printable(self.origin))
        table = torch.full((len(self.classes) + 1,), -1)
        table[used] = torch.tensor(numbers, dtype=table.dtype)
        return replace(self, labels=[table[labels] for labels in self.labels], classes=list(classes))


def collect(
    rows: Iterable[Objects], classes: Sequence[str], problems: Sequence[str], origin: Path | str, relative: bool = False
) -> BoxFiles:
    """Assemble files from the objects of each image.

    Args:
        rows: The images.
        classes: Names of the classes.
        problems: Messages about what was left out.
        origin: Where the images are from.
        relative: Whether coordinates are shares of the sides of the image.
    """
    if len(classes) > _MAX_CLASSES:
        raise ValueError(
            f"{printable(origin)}: {len(classes):,} classes of objects, more than {_MAX_CLASSES:,}: check the names"
        )
    images = list(rows)
    outlines = [row.outlines for row in images]
    has_outlines = any(outlines) and all(outline is not None for row in outlines for outline in row)
    return BoxFiles(
        [row.path for row in images],
        [torch.tensor(row.boxes, dtype=torch.float32).reshape(-1, 4) for row in images],
        [torch.tensor(row.labels, dtype=torch.int64) for row in images],
        classes,
        problems,
        outlines if has_outlines else (),
        [torch.tensor(row.crowd, dtype=torch.bool) for row in images],
        [torch.tensor(row.areas, dtype=torch.float32) for row in images],
        [row.size for row in images],
        relative,
        str(origin),
    )


def _fill(outline: Any, size: tuple[int, int], relative: bool, name: str) -> np.ndarray:
    """(H, W) uint8 mask of an object from polygons or run lengths, as COCO's own library fills them."""
    from faster_coco_eval import COCO

    width, height = size
    try:
        if width * height > MAX_MASK_PIXELS:
            raise ImageError(f"{name}: an outline in {width}x{height} pixels, more than {MAX_MASK_PIXELS:,}")
        if relative:
            outline = [(np.asarray(polygon, float).reshape(-1, 2) * size).reshape(-1).tolist() for polygon in outline]
        if isinstance(outline, dict):
            rows, cols = outline["size"]
            if (rows, cols) != (height, width):
                raise ImageError(f"{name}: an outline is of {cols}x{rows} pixels, the annotation of {width}x{height}")
            counts = outline["counts"]
            if not isinstance(counts, (str, bytes)) and sum(counts) != rows * cols:
                raise ImageError(f"{name}: run lengths of {sum(counts)} pixels for {cols}x{rows}")
        elif not outline or not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in outline):
            raise ImageError(f"{name}: an outline has no polygon of at least three points")
        else:
            _check_length(outline, size, name)
        library = COCO()
        library.imgs = {0: {"width": width, "height": height}}
        mask: np.ndarray = library.annToMask({"image_id": 0, "segmentation": outline})
        return mask.astype(np.uint8)
    except ImageError:
        raise
    except Exception as error:  # the library's C code raises nearly anything for damaged run lengths
        raise ImageError(f"{name}: an outline is neither polygons nor run lengths ({error})") from None


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 mask of a width and height in pixels."""
    if mask.shape[::-1] == size:
        return mask
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _check_length(polygons: Sequence[Sequence[float]], size: tuple[int, int], name: str) -> None:
    """Raise ImageError if polygons are not finite, or so long that following them takes minutes."""
    length = 0.0
    for polygon in polygons:
        points = np.asarray(polygon, float).reshape(-1, 2)
        length += float(np.abs(np.diff(points, axis=0, append=points[:1])).max(1).sum())
    if not length <= _MAX_LENGTH:  # also of NaN
        raise ImageError(f"{name}: an outline is {length:.3g} pixels long, in an image of {size[0]}x{size[1]}")
