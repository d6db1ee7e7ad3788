"""Pictures with boxes or masks as loaders read them, for training and for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from aptvit.dense.transforms import box_transform, fit, mask_transform, with_boxes, with_mask
from aptvit.files.annotations import BoxFiles, MaskFiles
from aptvit.files.images import ImageError
from aptvit.training.data import seeded
from aptvit.training.recipe import Recipe
from aptvit.training.sampler import FILLER, Draw
from aptvit.training.samples import Again

__all__ = ["BoxPictures", "ContentSamples", "MaskPictures"]

Row = tuple[Tensor, Any, bool, int, str]  # uint8 picture, target, whether it could be read, number, problem
_SIDE = 64  # of what stands in for a picture that cannot be read


class _Pictures(Dataset[Row], ABC):
    """What both kinds do: read, or stand in for what cannot be read; transform by the seed of the draw.

    Args:
        source: The files.
        side: Of what stands in, in pixels.
        transform: (image, target) -> (image, target); None for as they are.
    """

    def __init__(self, source: Any, side: int, transform: Callable[[Tensor, Any], tuple[Tensor, Any]] | None) -> None:
        self.source, self.side, self.transform = source, side, transform

    @abstractmethod
    def _read(self, index: int) -> tuple[Tensor, Any]:
        """A picture and its target."""

    @abstractmethod
    def _nothing(self) -> Any:
        """The target of a picture that cannot be read."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw | int) -> Row:
        index, seed = (draw, 0) if isinstance(draw, int) else draw
        try:
            if draw == FILLER:
                raise ImageError("")
            image, target = self._read(index)
        except ImageError as error:
            gray = torch.full((3, self.side, self.side), 128, dtype=torch.uint8)
            return gray, self._nothing(), False, index, str(error)
        if self.transform is not None:
            with seeded(seed):
                image, target = self.transform(image, target)
        return image.as_subclass(Tensor), _plain(target), True, index, ""


class BoxPictures(_Pictures):
    """Pictures and ``{"boxes", "labels"}``, labels from 0, and ``"masks"`` if they are wanted.

    Args:
        source: The files.
        recipe: Augmentation to squares of its ``size``; None for pictures as they are.
        masks: Give (n, H, W) masks of the objects.

    Raises:
        ValueError: If masks are wanted and there are no outlines.
    """

    def __init__(self, source: BoxFiles, recipe: Recipe | None = None, masks: bool = False) -> None:
        if masks and not source.outlines:
            raise ValueError("these pictures have no outlines: masks need COCO's polygons or run lengths")
        transform = None if recipe is None else box_transform(recipe.size, _pair(recipe.jitter), recipe.flip)
        super().__init__(source, _SIDE if recipe is None else recipe.size, transform)
        self.masks = masks

    def _read(self, index: int) -> tuple[Tensor, Any]:
        picture, boxes, labels = self.source.load(index)
        masks = self.source.masks(index, picture.width, picture.height) if self.masks else None
        return with_boxes(pil_to_tensor(picture), boxes, labels, masks)

    def _nothing(self) -> Any:
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        if self.masks:
            nothing["masks"] = torch.zeros(0, self.side, self.side, dtype=torch.uint8)
        return nothing


class MaskPictures(_Pictures):
    """Pictures and (H, W) uint8 classes, 255 for none.

    Args:
        source: The files.
        recipe: Augmentation to squares of its ``size``; None for pictures as they are.
        longer_side: Of pictures without augmentation, as for `fit`; masks stay as they are.
        shrink: Likewise.
    """

    def __init__(
        self, source: MaskFiles, recipe: Recipe | None = None, longer_side: int = 0, shrink: float = 1.0
    ) -> None:
        transform: Any = None
        if recipe is not None:
            transform = mask_transform(recipe.size, _pair(recipe.jitter), recipe.flip, recipe.distort)
        else:
            transform = partial(_fit_image, longer_side, shrink)
        super().__init__(source, _SIDE if recipe is None else recipe.size, transform)

    def _read(self, index: int) -> tuple[Tensor, Any]:
        picture, classes = self.source.load(index)
        return with_mask(pil_to_tensor(picture), classes)

    def _nothing(self) -> Any:
        return torch.full((self.side, self.side), 255, dtype=torch.uint8)


def _fit_image(longer_side: int, shrink: float, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return fit(image, longer_side, shrink), mask


def _plain(target: Any) -> Any:
    if isinstance(target, dict):
        return {name: one.as_subclass(Tensor) for name, one in target.items()}
    return target.as_subclass(Tensor)


def _pair(jitter: tuple[float, ...]) -> tuple[float, float]:
    return jitter[0], jitter[1]


class ContentSamples:
    """Training pictures to find thresholds on: as evaluation shows them, without any padding.

    Args:
        pictures: As they are.
        prepare: A uint8 picture to a normalised one.
        window: Side of windows in pixels, 1 without: pictures are cut to whole windows instead of filled up.
    """

    def __init__(self, pictures: Dataset[Row], prepare: Callable[[Tensor], Tensor], window: int = 1) -> None:
        self._pictures: Any = pictures
        self._prepare, self._window = prepare, window

    def trained(self, epoch: int = 0) -> Again:
        """The same as `plain`: what is cut out and filled up for training has more that is smooth."""
        return self.plain()

    def plain(self, most: int = 512) -> Again:
        """Lists of one picture, spread over all."""

        def start() -> Iterator[list[Tensor]]:
            for number in range(0, len(self._pictures), max(1, -(-len(self._pictures) // most))):
                image, _, valid, _, _ = self._pictures[number]
                if valid:
                    content = self._prepare(image)
                    height, width = (max(side // self._window, 1) * self._window for side in content.shape[1:])
                    yield [content[:, :height, :width]]

        return Again(start)
