"""Large images: reduced before a network reads them, or cut into tiles; results in the image's own pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["MAX_SIDE", "ObjectMask", "are_fragments", "classes_at", "masks_of", "reduce_to", "tiles"]

MAX_SIDE = 1440
"""Longer side in pixels that `aptvit detect` and `aptvit segment` reduce larger images to."""

_EDGE = 4.0  # pixels from the edge of a tile within which a box ends there because the tile does
_STRIP = 256  # rows that are enlarged at a time


def reduce_to(image: Image.Image, max_side: int | None) -> Image.Image:
    """Reduce an image whose longer side is more than ``max_side`` pixels; None leaves every image as it is."""
    longest = max(image.size)
    if max_side is None or longest <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def tiles(size: tuple[int, int], side: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Cut an image into square tiles that overlap by a quarter or more.

    Args:
        size: (height, width) of the image in pixels.
        side: Side of a tile in pixels; the image may be smaller.

    Returns:
        For each tile its rows and columns, and those of the pixels that are nearer to its middle than to that of other
        tiles: these do not overlap, and cover the image.
    """
    rows, cols = (list(_spans(length, side)) for length in size)
    return [((row[0], col[0]), (row[1], col[1])) for row, col in product(rows, cols)]


def _spans(length: int, side: int) -> Iterator[tuple[slice, slice]]:
    count = 1 if length <= side else -(-(length - side) // (side * 3 // 4)) + 1
    starts = [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]
    cuts = [0, *((left + side + right) // 2 for left, right in pairwise(starts)), length]
    for start, cut in zip(starts, pairwise(cuts), strict=True):
        yield slice(start, min(start + side, length)), slice(*cut)


def classes_at(probabilities: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The likeliest class of each pixel after bilinear enlargement, a strip of rows at a time.

    Args:
        probabilities: (classes, h, w).
        size: (height, width) of the result in pixels.

    Returns:
        (height, width) uint8, or int64 if there are more than 256 classes.
    """
    (height, width), rows = size, probabilities.shape[1]
    centres = (torch.arange(height, device=probabilities.device) + 0.5) * rows / height - 0.5
    centres = centres.clamp(0, rows - 1)
    above = centres.long().clamp(max=max(rows - 2, 0))
    below, weight = (above + 1).clamp(max=rows - 1), (centres - above)[:, None].to(probabilities.dtype)
    result = np.empty(size, dtype=np.uint8 if len(probabilities) <= 256 else np.int64)
    for strip in torch.arange(height, device=probabilities.device).split(_STRIP):
        upper, lower = probabilities[:, above[strip]], probabilities[:, below[strip]]
        lines = torch.lerp(upper, lower, weight[strip])
        wide = F.interpolate(lines[None], size=(len(strip), width), mode="bilinear", align_corners=False)[0]
        result[strip.cpu().numpy()] = wide.argmax(0).cpu().numpy()
    return result


@dataclass(frozen=True)
class ObjectMask:
    """The pixels of an object, as the network read them: a hundred masks of a large image would not fit into memory.

    Attributes:
        probabilities: (h, w) uint8, from 0 to 255 for 1.
        place: Left, top, right and bottom of that in pixels of the image, the image or a tile.
        size: (height, width) of the image in pixels.
    """

    probabilities: np.ndarray
    place: tuple[int, int, int, int]
    size: tuple[int, int]

    def pixels(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """The object's pixels in the image.

        Args:
            size: (height, width) of the image after resizing; by default its own.

        Returns:
            (height, width) bool.
        """
        height, width = size or self.size
        mask = np.zeros((height, width), dtype=bool)
        factors = np.array([width / self.size[1], height / self.size[0]] * 2)
        left, top, right, bottom = np.rint(np.array(self.place) * factors).astype(int)
        if right > left and bottom > top:
            enlarged = Image.fromarray(self.probabilities)
            enlarged = enlarged.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
            mask[top:bottom, left:right] = np.asarray(enlarged) >= 128
        return mask


def masks_of(probabilities: Tensor, size: tuple[int, int]) -> tuple[ObjectMask, ...]:
    """The masks of (n, 1, h, w) probabilities of objects in an image of (height, width) pixels."""
    values = (probabilities[:, 0] * 255).round().byte().cpu().numpy()
    return tuple(ObjectMask(value, (0, 0, size[1], size[0]), size) for value in values)


def are_fragments(
    boxes: np.ndarray, labels: np.ndarray, windows: list[tuple[slice, slice]], size: tuple[int, int]
) -> np.ndarray:
    """Find boxes that end where their tile does, and of which a larger box of the class covers more than half.

    Args:
        boxes: (n, 4) corners in pixels of the image.
        labels: (n,) classes.
        windows: Rows and columns of the tile of each box.
        size: (height, width) of the image in pixels.

    Returns:
        (n,) bool.
    """
    edges = np.array([(cols.start, rows.start, cols.stop, rows.stop) for rows, cols in windows]).reshape(-1, 4)
    inside = edges != (0, 0, size[1], size[0])  # edges of a tile that are not the image's own
    cut = ((np.abs(boxes - edges) <= _EDGE) & inside).any(1)
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared, areas = (high - low).clip(0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    covered = (labels[:, None] == labels) & (areas[:, None] < areas) & (shared > areas[:, None] / 2)
    fragments: np.ndarray = cut & covered.any(1)
    return fragments
