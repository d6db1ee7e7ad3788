"""Images with boxes or masks as loaders read them, for training and for evaluation."""

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
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.sampler import FILLER, Draw
from aptvit.training.samples import Repeatable

__all__ = ["BoxDataset", "ContentSamples", "MaskDataset"]

Row = tuple[Tensor, Any, bool, int, str]  # uint8 image, target, whether it could be read, number, problem
_SIDE = 64  # of the gray image in place of a file that cannot be read


class _DenseDataset(Dataset[Row], ABC):
    """Reads files, with a gray image in place of those that cannot be read; transforms by the seed of the draw.

    Args:
        source: The files.
        side: Of the gray image, in pixels.
        transform: (image, target) -> (image, target); None for none.
    """

    def __init__(self, source: Any, side: int, transform: Callable[[Tensor, Any], tuple[Tensor, Any]] | None) -> None:
        self.source, self.side, self.transform = source, side, transform

    @abstractmethod
    def _read(self, index: int) -> tuple[Tensor, Any]:
        """An image and its target."""

    @abstractmethod
    def _nothing(self) -> Any:
        """The target of a file that cannot be read."""

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


class BoxDataset(_DenseDataset):
    """Images and ``{"boxes", "labels"}``, labels from 0, and ``"masks"`` if they are wanted.

    Args:
        source: The files.
        recipe: Augmentation to squares of its ``size``; None for none.
        masks: Give (n, H, W) masks of the objects.

    Raises:
        ValueError: If masks are wanted and there are no outlines.
    """

    def __init__(self, source: BoxFiles, recipe: DetectionRecipe | None = None, masks: bool = False) -> None:
        if masks and not source.outlines:
            raise ValueError("these images have no outlines: masks need COCO's polygons or run lengths")
        transform = None if recipe is None else box_transform(recipe.size, _pair(recipe.jitter), recipe.flip)
        super().__init__(source, _SIDE if recipe is None else recipe.size, transform)
        self.masks = masks

    def _read(self, index: int) -> tuple[Tensor, Any]:
        image, boxes, labels = self.source.load(index)
        masks = self.source.masks(index, image.width, image.height) if self.masks else None
        return with_boxes(pil_to_tensor(image), boxes, labels, masks)

    def _nothing(self) -> Any:
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        if self.masks:
            nothing["masks"] = torch.zeros(0, self.side, self.side, dtype=torch.uint8)
        return nothing


class MaskDataset(_DenseDataset):
    """Images and (H, W) uint8 classes, 255 for none.

    Args:
        source: The files.
        recipe: Augmentation to squares of its ``size``; None for none.
        longer_side: Of images without augmentation, as for `fit`; masks stay as they are.
        shrink: Likewise.
    """

    def __init__(
        self, source: MaskFiles, recipe: SegmentationRecipe | None = None, longer_side: int = 0, shrink: float = 1.0
    ) -> None:
        transform: Any = None
        if recipe is not None:
            transform = mask_transform(recipe.size, _pair(recipe.jitter), recipe.flip, recipe.distort)
        else:
            transform = partial(_fit_image, longer_side, shrink)
        super().__init__(source, _SIDE if recipe is None else recipe.size, transform)

    def _read(self, index: int) -> tuple[Tensor, Any]:
        image, classes = self.source.load(index)
        return with_mask(pil_to_tensor(image), classes)

    def _nothing(self) -> Any:
        return torch.full((self.side, self.side), 255, dtype=torch.uint8)


def _fit_image(longer_side: int, shrink: float, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return fit(image, longer_side, shrink), mask


def _plain(target: Any) -> Any:
    if isinstance(target, dict):
        return {name: value.as_subclass(Tensor) for name, value in target.items()}
    return target.as_subclass(Tensor)


def _pair(jitter: tuple[float, ...]) -> tuple[float, float]:
    return jitter[0], jitter[1]


class ContentSamples:
    """Training images for calibration: as they are evaluated, without any padding.

    Args:
        dataset: The images, without augmentation.
        prepare: From (C, H, W) uint8 to a normalised image.
        window: Side of windows in pixels, 1 without: images are cut to whole windows instead of padded.
    """

    def __init__(self, dataset: Dataset[Row], prepare: Callable[[Tensor], Tensor], window: int = 1) -> None:
        self._dataset: Any = dataset
        self._prepare, self._window = prepare, window

    def trained(self, epoch: int = 0) -> Repeatable:
        """The same as `plain`: padded training crops have more smooth areas."""
        return self.plain()

    def plain(self, most: int = 512) -> Repeatable:
        """Lists of a single image, spread over all."""

        def start() -> Iterator[list[Tensor]]:
            for number in range(0, len(self._dataset), max(1, -(-len(self._dataset) // most))):
                image, _, valid, _, _ = self._dataset[number]
                if valid:
                    content = self._prepare(image)
                    height, width = (max(side // self._window, 1) * self._window for side in content.shape[1:])
                    yield [content[:, :height, :width]]

        return Repeatable(start)
