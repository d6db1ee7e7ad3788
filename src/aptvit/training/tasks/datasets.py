"""Datasets of images with boxes or masks, for training and for evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from aptvit.datasets.boxes import BoxFiles
from aptvit.datasets.masks import MaskFiles
from aptvit.dense.large import reduce_to
from aptvit.dense.transforms import box_transform, fit, mask_transform, with_boxes, with_mask
from aptvit.files.images import ImageError
from aptvit.training.data import seeded
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.sampler import FILLER, Draw
from aptvit.training.samples import Repeatable

__all__ = ["BoxDataset", "ContentSamples", "MaskDataset"]

DatasetItem = tuple[Tensor, Any, bool, int, str]
"""Image (C, H, W) uint8, target, whether it could be read, number, and problem or an empty string."""

_SIDE = 64  # side of the gray image that replaces a file that cannot be read, without augmentation


class _DenseDataset(Dataset[DatasetItem], ABC):
    """Reads images with targets by number or `Draw`; a file that cannot be read is replaced by a gray image.

    Args:
        source: The files.
        side: Side of the gray image in pixels.
        transform: (image, target) -> (image, target), seeded by the draw; None for none.
    """

    def __init__(self, source: Any, side: int, transform: Callable[[Tensor, Any], tuple[Tensor, Any]] | None) -> None:
        self.source, self.side, self.transform = source, side, transform

    @abstractmethod
    def _read(self, index: int) -> tuple[Tensor, Any]:
        """Read an image and its target."""

    @abstractmethod
    def _empty_target(self) -> Any:
        """Return the target of the gray image."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw | int) -> DatasetItem:
        index, seed = (draw, 0) if isinstance(draw, int) else draw
        try:
            if draw == FILLER:
                raise ImageError("")
            image, target = self._read(index)
        except ImageError as error:
            gray = torch.full((3, self.side, self.side), 128, dtype=torch.uint8)
            return gray, self._empty_target(), False, index, str(error)
        if self.transform is not None:
            with seeded(seed):
                image, target = self.transform(image, target)
        return image.as_subclass(Tensor), _as_tensors(target), True, index, ""


class BoxDataset(_DenseDataset):
    """Images with ``"boxes"`` (n, 4) in pixels, ``"labels"`` (n,) from 0, and optionally ``"masks"`` (n, H, W) uint8.

    For evaluation, without a recipe, also ``"iscrowd"`` (n,) and ``"area"`` (n,), which COCO's metrics read.

    Args:
        source: The files.
        recipe: Settings of the augmentation, which crops images to squares of ``size``; None for none.
        masks: Whether to return masks.
        longest: Longer side in pixels that larger images are reduced to; with a recipe that of its largest scale.

    Raises:
        ValueError: If masks are requested and the files have no outlines.
    """

    def __init__(
        self,
        source: BoxFiles,
        recipe: DetectionRecipe | None = None,
        masks: bool = False,
        longest: int | None = None,
    ) -> None:
        if masks and not source.outlines:
            raise ValueError("these images have no outlines: masks need the polygons or run lengths of COCO")
        transform = None if recipe is None else box_transform(recipe.size, _pair(recipe.jitter), recipe.flip)
        super().__init__(source, _SIDE if recipe is None else recipe.size, transform)
        self.masks, self.longest = masks, longest if recipe is None else _longest(recipe)

    def _read(self, index: int) -> tuple[Tensor, Any]:
        if self.longest is None:
            return self._read_all(index)
        image, boxes, labels = self.source.load(index)
        reduced = reduce_to(image, self.longest)
        masks = self.source.masks(index, *image.size, size=reduced.size) if self.masks else None
        factors = torch.tensor([reduced.width / image.width, reduced.height / image.height] * 2)
        return with_boxes(pil_to_tensor(reduced), boxes * factors, labels, masks)

    def _read_all(self, index: int) -> tuple[Tensor, Any]:
        objects = self.source.load_objects(index)
        size = objects.image.size
        masks = self.source.masks(index, *size, crowds=True) if self.masks else None
        image, target = with_boxes(pil_to_tensor(objects.image), objects.boxes, objects.labels, masks)
        return image, {**target, "iscrowd": objects.crowd.long(), "area": objects.areas}

    def _empty_target(self) -> Any:
        target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        if self.transform is None:
            target |= {"iscrowd": torch.zeros(0, dtype=torch.int64), "area": torch.zeros(0)}
        if self.masks:
            target["masks"] = torch.zeros(0, self.side, self.side, dtype=torch.uint8)
        return target


class MaskDataset(_DenseDataset):
    """Images with (H, W) classes of pixels: uint8 with 255 for no class, or int32 with 65,535 for over 255 classes.

    Args:
        source: The files.
        recipe: Settings of the augmentation, which crops images to squares of ``size``; None for none.
        longer_side: Without augmentation, longer side that images are resized to, see `aptvit.dense.transforms.fit`;
            masks are not resized.
        shrink: Without augmentation, factor of the sides, see `aptvit.dense.transforms.fit`.
    """

    def __init__(
        self, source: MaskFiles, recipe: SegmentationRecipe | None = None, longer_side: int = 0, shrink: float = 1.0
    ) -> None:
        transform: Any = None
        if recipe is not None:
            transform = mask_transform(
                recipe.size, _pair(recipe.jitter), recipe.flip, recipe.distort, no_class=source.no_class
            )
        else:
            transform = partial(_fit_image, longer_side, shrink)
        super().__init__(source, _SIDE if recipe is None else recipe.size, transform)
        # Larger images are reduced before they become tensors, which take more memory.
        self.longest = _longest(recipe) if recipe is not None else 2 * longer_side or None
        self.fits_masks = recipe is not None

    def _read(self, index: int) -> tuple[Tensor, Any]:
        image, classes = self.source.load(index)
        dtype = torch.uint8 if self.source.no_class == 255 else torch.int32
        reduced = reduce_to(image, self.longest)
        if reduced is not image and self.fits_masks:
            classes = resize(classes[None], [reduced.height, reduced.width], InterpolationMode.NEAREST_EXACT)[0]
        return with_mask(pil_to_tensor(reduced), classes.to(dtype))

    def _empty_target(self) -> Any:
        dtype = torch.uint8 if self.source.no_class == 255 else torch.int32
        return torch.full((self.side, self.side), self.source.no_class, dtype=dtype)


def _fit_image(longer_side: int, shrink: float, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return fit(image, longer_side, shrink), mask


def _as_tensors(target: Any) -> Any:
    if isinstance(target, dict):
        return {name: value.as_subclass(Tensor) for name, value in target.items()}
    return target.as_subclass(Tensor)


def _longest(recipe: DetectionRecipe | SegmentationRecipe) -> int:
    """Longer side in pixels of the largest scale of the augmentation: of more, nothing would be left."""
    return math.ceil(recipe.size * max(recipe.jitter))


def _pair(jitter: tuple[float, ...]) -> tuple[float, float]:
    return jitter[0], jitter[1]


class ContentSamples:
    """A sample of training images for calibration, transformed as in evaluation but without padding.

    Args:
        dataset: The images, without augmentation.
        prepare: Converts (C, H, W) uint8 to a normalised image on the device.
        window: Side of attention windows in pixels, 1 without windows; images are cropped to whole windows.
    """

    def __init__(self, dataset: Dataset[DatasetItem], prepare: Callable[[Tensor], Tensor], window: int = 1) -> None:
        self._dataset: Any = dataset
        self._prepare, self._window = prepare, window

    def augmented(self, epoch: int = 0) -> Repeatable:
        """Return the images of `plain`: padded training crops have more smooth areas, and so other thresholds."""
        return self.plain()

    def plain(self, most: int = 512) -> Repeatable:
        """Return lists of a single image, (C, H, W), at most ``most``, spread evenly over the training images."""

        numbers = range(0, len(self._dataset), max(1, -(-len(self._dataset) // most)))

        def start() -> Iterator[list[Tensor]]:
            for number in numbers:
                image, _, valid, _, _ = self._dataset[number]
                if valid:
                    content = self._prepare(image)
                    height, width = (max(side // self._window, 1) * self._window for side in content.shape[1:])
                    yield [content[:, :height, :width]]

        return Repeatable(start, len(numbers))
