"""Images with masks, a class for each pixel, as all readers of masks return them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.datasets.mask_values import NO_CLASS, ColourTable, read_numbers
from aptvit.datasets.placement import place
from aptvit.files.images import ImageError, open_image, turn_of
from aptvit.files.text import printable

__all__ = ["MaskFiles"]


@dataclass(frozen=True)
class MaskFiles:
    """Image files with masks: a class for each pixel.

    Attributes:
        paths: The image files.
        masks: Mask files; the value of a pixel is its class.
        num_classes: Number of classes; larger values are an error, except values to ignore.
        ignore: Values of pixels without a class.
        subtract: Number of the first class in the files: 1 for ADE20K, where 0 is no class, else 0.
        names: Names of the classes; empty for their numbers.
        problems: Messages about what was left out.
        origin: Where the images are from.
        table: Colours of the classes, if masks are in colours, see `aptvit.datasets.mask_values.read_numbers`.
        numbers: Class of each value, where values are not the classes themselves; empty otherwise.
    """

    paths: Sequence[Path]
    masks: Sequence[Path]
    num_classes: int = 0
    ignore: frozenset[int] = field(default_factory=lambda: frozenset((255,)))
    subtract: int = 0
    names: Sequence[str] = ()
    problems: Sequence[str] = ()
    origin: str = ""
    table: ColourTable | str | None = None
    numbers: Mapping[int, int] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.names) or [str(number) for number in range(self.num_classes)]

    @property
    def no_class(self) -> int:
        """Value of pixels without a class in what `load` returns: 255, or 65,535 for more than 255 classes."""
        return 255 if self.num_classes <= 255 else 65535

    @property
    def note(self) -> str:
        """How values are read, in a few words."""
        if isinstance(self.table, ColourTable):
            return f"masks in {self.table.source}"
        if self.table is not None:
            return "masks in the colours of ADE20K"
        if self.numbers:
            examples = [f"{value} is {number}" for value, number in sorted(self.numbers.items()) if number != NO_CLASS]
            return f"in masks {', '.join(examples[:3])}{', ...' if len(examples) > 3 else ''}"
        words = [str(value) for value in sorted(self.ignore)] + ["0"] * (self.subtract > 0)
        return f"pixels of {' and '.join(words)} in masks have no class" if words else ""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Name of an image for messages."""
        return printable(self.paths[index])

    def read_mask(self, index: int) -> np.ndarray:
        """Read a mask as it is stored: (H, W) int64 numbers of classes, -1 for pixels without a class.

        Args:
            index: Number of the image.

        Raises:
            ImageError: If the file cannot be read, or has colours instead of numbers.
        """
        values = read_numbers(self.masks[index], self.table)
        if isinstance(self.table, ColourTable):
            return values
        ignored = np.isin(values, list(self.ignore))
        if self.numbers:
            classes = np.full_like(values, NO_CLASS)
            ignored = np.zeros_like(ignored)
            for value in np.unique(values).tolist():
                if value not in self.numbers:
                    raise ImageError(f"{printable(self.masks[index])}: the value {value} is not one of this dataset")
                classes[values == value] = self.numbers[value]
        else:
            classes = values - self.subtract
        classes[ignored | (classes < 0)] = NO_CLASS
        return classes

    def load(self, index: int) -> tuple[Image.Image, Tensor]:
        """Read an image with its mask.

        Args:
            index: Number of the image.

        Returns:
            The upright RGB image, and (H, W) int64 classes, `no_class` for pixels without a class.

        Raises:
            ImageError: If a file cannot be read, the mask does not fit the image, or has a class that does not exist.
        """
        image, classes = open_image(self.paths[index]), self.read_mask(index)
        name, size = printable(self.masks[index]), (classes.shape[1], classes.shape[0])
        classes = place(name, size, image.size, turn_of(self.paths[index]), "the mask has").mask(classes)
        if self.num_classes and classes.max(initial=NO_CLASS) >= self.num_classes:
            raise ImageError(
                f"{name}: label {int(classes.max()) + self.subtract} is out of range, there are {self.num_classes} "
                "classes; name more classes, or ignore it"
            )
        classes[classes == NO_CLASS] = self.no_class
        return image, torch.from_numpy(classes)

    def only(self, index: Iterable[int], origin: str = "") -> MaskFiles:
        """The images of these numbers.

        Args:
            index: The numbers.
            origin: Where they are from; by default as before.
        """
        chosen = list(index)
        paths, masks = [self.paths[i] for i in chosen], [self.masks[i] for i in chosen]
        return replace(self, paths=paths, masks=masks, origin=origin or self.origin)
