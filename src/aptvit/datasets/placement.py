"""Where annotations lie in the upright image, if they were made for the file's own orientation or another size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.files.images import ImageError

__all__ = ["Placement", "place"]

_SWAPS = frozenset(
    (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
)
_CORNERS = {  # x, y of the image of (0, 0) and of (1, 1), in the unit square of the turned image
    Image.Transpose.FLIP_LEFT_RIGHT: (1, 0, 0, 1),
    Image.Transpose.ROTATE_180: (1, 1, 0, 0),
    Image.Transpose.FLIP_TOP_BOTTOM: (0, 1, 1, 0),
    Image.Transpose.TRANSPOSE: (0, 0, 1, 1),
    Image.Transpose.ROTATE_270: (1, 0, 0, 1),
    Image.Transpose.TRANSVERSE: (1, 1, 0, 0),
    Image.Transpose.ROTATE_90: (0, 1, 1, 0),
}


@dataclass(frozen=True)
class Placement:
    """A map from the frame of annotations to the upright image: a turn, then a scale.

    Attributes:
        frame: Width and height of the frame of the annotations.
        size: Width and height of the upright image.
        turn: The turn, or None.
    """

    frame: tuple[int, int]
    size: tuple[int, int]
    turn: Image.Transpose | None = None

    @property
    def is_identity(self) -> bool:
        """Whether annotations already lie in the upright image."""
        return self.turn is None and self.frame == self.size

    def boxes(self, boxes: Tensor) -> Tensor:
        """Map boxes.

        Args:
            boxes: (n, 4) corners x1, y1, x2, y2 in the frame of the annotations.

        Returns:
            (n, 4) corners in pixels of the upright image.
        """
        if self.is_identity:
            return boxes
        unit = boxes.double().reshape(-1, 2, 2) / torch.tensor(self.frame, dtype=torch.float64)  # (n, corner, xy)
        if self.turn is not None:
            if self.turn in _SWAPS:
                unit = unit.flip(2)
            x0, y0, x1, y1 = _CORNERS[self.turn]
            unit = torch.stack([x0 + (x1 - x0) * unit[..., 0], y0 + (y1 - y0) * unit[..., 1]], 2)
            unit = torch.stack([unit.amin(1), unit.amax(1)], 1)
        return (unit * torch.tensor(self.size, dtype=torch.float64)).reshape(-1, 4).to(boxes.dtype)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Map a mask, without mixing values.

        Args:
            mask: (h, w) of the size of the frame.

        Returns:
            (H, W) of the size of the upright image.
        """
        if self.is_identity:
            return mask
        index = np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
        # Pillow turns and scales the numbers of the pixels: it knows fewer types of pixels than masks have.
        turned = Image.fromarray(index, mode="I")
        if self.turn is not None:
            turned = turned.transpose(self.turn)
        return mask.reshape(-1)[np.asarray(turned.resize(self.size, Image.Resampling.NEAREST))]


def place(
    name: str,
    frame: tuple[int, int] | None,
    size: tuple[int, int],
    turn: Image.Transpose | None,
    subject: str = "the boxes are for",
) -> Placement:
    """Find out how annotations lie in an image.

    Args:
        name: The image or the file of the annotations, for messages.
        frame: Width and height that the annotations name, or None: then they are taken for the upright image.
        size: Width and height of the upright image.
        turn: The turn that made the file upright, see `aptvit.files.images.turn_of`; None for none.
        subject: Beginning of messages.

    Raises:
        ImageError: If the annotations fit the image in no way, or in several.
    """
    if frame is None:
        return Placement(size, size)
    if min(frame) < 1:
        raise ImageError(f"{name}: {subject} {frame[0]}x{frame[1]} pixels: mend width and height")
    stored = size[::-1] if turn in _SWAPS else size
    upright, turned = frame == size, turn is not None and frame == stored
    if not (upright or turned):
        upright, turned = _same_shape(frame, size), turn is not None and _same_shape(frame, stored)
    message = f"{name}: {subject} {frame[0]}x{frame[1]} pixels, the upright image has {size[0]}x{size[1]}"
    if upright and turned:
        raise ImageError(
            f"{message}, which its file tells viewers to turn: whether annotations are for the turned image cannot be "
            "told; save the image upright"
        )
    if not (upright or turned):
        raise ImageError(f"{message}: give annotations for this image, or the image that they were made for")
    return Placement(frame, size, turn if turned else None)


def _same_shape(frame: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether two sizes differ by a common factor only, up to the rounding of a resized side to whole pixels."""
    small, large = sorted((frame, size))
    return abs(large[0] * small[1] - large[1] * small[0]) <= sum(large) / 2
