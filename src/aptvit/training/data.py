"""Batches for training: images are read and augmented in workers, then normalised, erased and mixed on the device.

The augmentation of an image depends only on seed, epoch and image, not on the worker or process that reads it, so an
interrupted training continues with the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomHorizontalFlip

from aptvit.datasets.sources import UNLABELLED, Source
from aptvit.files.images import ImageError
from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.images import ImageRecipe
from aptvit.training.sampler import FILLER, Draw
from aptvit.training.stopping import ignore_signals, signals_held

__all__ = ["Batch", "DeviceAugmentation", "ImageDataset", "make_loader"]


@dataclass(frozen=True)
class Batch:
    """A batch of images from a loader.

    Attributes:
        images: (B, C, H, W) uint8, or a list of B tensors (C, H, W) of different sizes; gray if a file cannot be read.
        targets: (B,) classes, -1 for none; (B, H, W) classes of pixels; or a list of B dicts of boxes and labels.
        valid: (B,) bool; False if a file cannot be read or a label is missing: the image has no weight in the loss.
        index: (B,) numbers of the images in the dataset.
        problems: Reasons why files cannot be read.
    """

    images: Any
    targets: Any
    valid: Tensor
    index: Tensor
    problems: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Copy the batch to pinned memory, from which copies to a GPU are asynchronous."""
        images, targets, valid, index = (
            _map_tensors(part, Tensor.pin_memory) for part in (self.images, self.targets, self.valid, self.index)
        )
        return Batch(images, targets, valid, index, self.problems)

    def parts(self, number: int) -> list[Batch]:
        """Split the batch into parts of nearly equal size.

        Args:
            number: Number of parts.

        Returns:
            Parts with at least one image each: a batch with fewer images than parts is filled up with copies of its
            first image that have no weight.
        """
        indices = torch.arange(max(len(self), number))
        filler = indices >= len(self)
        indices[filler] = 0
        valid = self.valid[indices] & ~filler
        parts = zip(indices.tensor_split(number), valid.tensor_split(number), strict=True)
        return [
            Batch(_select(self.images, part), _select(self.targets, part), part_valid, self.index[part], [])
            for part, part_valid in parts
        ]


def _select(values: Any, indices: Tensor) -> Any:
    return values[indices] if isinstance(values, Tensor) else [values[i] for i in indices.tolist()]


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_tensors(part, change) for name, part in value.items()}
    return [_map_tensors(part, change) for part in value]


class ImageDataset(Dataset[tuple[Tensor, int, bool, int, str]]):
    """Images of a source, read by number or `Draw`, and transformed.

    Items are (image, class, whether it could be read, number, problem). The image is (C, H, W) uint8, the class -1 for
    none, and the problem the reason why the file cannot be read, else empty.

    Args:
        source: The images.
        data: timm's data configuration of the model: size, interpolation, crop.
        recipe: Settings of the augmentation; None for the evaluation transform.
        labelled: Whether images without a label count as images that cannot be read: without weight.
    """

    def __init__(
        self, source: Source, data: dict[str, Any], recipe: ImageRecipe | None = None, labelled: bool = False
    ) -> None:
        self.source, self.labelled = source, labelled
        self.size = tuple(data["input_size"])
        self.transform = _transform(data, recipe)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int, bool, int, str]:
        index, seed = (draw, 0) if isinstance(draw, int) else draw
        gray = torch.full(self.size, 128, dtype=torch.uint8)
        if draw == FILLER:
            return gray, UNLABELLED, False, index, ""
        try:
            image, label = self.source.load(index)
        except ImageError as error:
            return gray, UNLABELLED, False, index, str(error)
        with seeded(seed):
            return torch.as_tensor(self.transform(image)), label, label >= 0 or not self.labelled, index, ""


def _transform(data: dict[str, Any], recipe: ImageRecipe | None) -> Any:
    common = {"input_size": data["input_size"], "interpolation": data["interpolation"], "use_prefetcher": True}
    if recipe is None or (recipe.crop == 1 and not recipe.auto_augment and not recipe.color_jitter):
        transform = create_transform(
            **common, is_training=False, crop_pct=data["crop_pct"], crop_mode=data.get("crop_mode")
        )
        if recipe is not None and recipe.flip:
            flip = RandomHorizontalFlip(recipe.flip)
            return lambda image: transform(flip(image))
        return transform
    return create_transform(
        **common,
        is_training=True,
        mean=data["mean"],
        scale=(recipe.crop, 1.0),
        hflip=recipe.flip,
        auto_augment=recipe.auto_augment or None,
        color_jitter=recipe.color_jitter,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch inside the context, and restore their states after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _collate(rows: Sequence[tuple[Tensor, Any, bool, int, str]]) -> Batch:
    images, targets, valid, index, problems = zip(*rows, strict=True)
    reasons = [problem for problem in problems if problem]
    return Batch(_stacked(images), _stacked(targets), torch.tensor(valid), torch.tensor(index), reasons)


def _stacked(values: Sequence[Any]) -> Any:
    """Stack numbers, or tensors of the same shape, to a tensor; return other values as a list."""
    if isinstance(values[0], int):
        return torch.tensor(values)
    if isinstance(values[0], Tensor) and all(value.shape == values[0].shape for value in values):
        return torch.stack(list(values))
    return list(values)


def _valid_instead(valid: Tensor) -> Tensor:
    """(B,) numbers of the images, with valid ones in turn in the places of the others; unchanged if none is valid."""
    numbers, chosen = torch.arange(len(valid)), valid.nonzero()[:, 0]
    if len(chosen):
        numbers[~valid] = chosen[torch.arange(int((~valid).sum())) % len(chosen)]
    return numbers


class _Loader(DataLoader[Batch]):
    """A loader whose workers ignore the signals that stop a training, from their first moment."""

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()


def make_loader(dataset: Dataset[Any], batches: Any, workers: int, pin: bool = False) -> DataLoader[Batch]:
    """Create a loader of batches.

    Args:
        dataset: Returns (image, target, whether it could be read, number, problem) for a `Draw` or a number.
        batches: Iterable of lists of `Draw` or of numbers, a list for each batch.
        workers: Number of processes that read images; 0 reads in this process. Workers live as long as the loader,
            because starting them takes seconds on platforms that do not fork.
        pin: Pin memory, for copies to a GPU.

    Returns:
        A loader of `Batch`.
    """
    return _Loader(
        cast(Dataset[Batch], dataset),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),  # else starting the loader draws from the generator of the training
    )


def _start_worker(_worker: int) -> None:
    ignore_signals()
    torch.set_num_threads(1)


class DeviceAugmentation:
    """The part of the augmentation that runs on the training device: normalisation, random erasing, mixup and CutMix.

    Args:
        data: timm's data configuration of the model.
        recipe: Settings of the augmentation; None for normalisation only.
        num_classes: Number of classes of the targets; 0 without labels: then only images are mixed.
        device: The training device.
    """

    def __init__(
        self, data: dict[str, Any], recipe: ImageRecipe | None, num_classes: int, device: torch.device
    ) -> None:
        self.device, self.num_classes = device, num_classes
        self.mean = torch.tensor(data["mean"], device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(data["std"], device=device).view(1, -1, 1, 1)
        self.smoothing = recipe.label_smoothing if isinstance(recipe, ClassificationRecipe) else 0.0
        self.erase = self.mix = None
        if recipe is None:
            return
        if recipe.erasing:
            self.erase = RandomErasing(recipe.erasing, mode="pixel", device=str(device))
        if recipe.mixup or recipe.cutmix:
            alphas = recipe.mixup, recipe.cutmix
            self.mix = Mixup(*alphas, label_smoothing=self.smoothing, num_classes=max(num_classes, 1))

    def normalised(self, batch: Batch) -> Tensor:
        """Return the normalised images of a batch on the device, neither erased nor mixed, (B, C, H, W)."""
        return (batch.images.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Augment a batch.

        Returns:
            (B, C, H, W) normalised images; and with labels (B, classes) targets that sum to one, else None.
        """
        images = self.normalised(batch)
        if self.erase is not None:
            images = self.erase(images)
        labels = batch.targets.clamp(min=0) if self.num_classes else torch.zeros_like(batch.targets)
        targets = labels.to(self.device, non_blocking=True)
        if self.mix is not None and not batch.valid.all():
            # An image without weight must not be mixed into others: a valid image takes its place.
            partners = _valid_instead(batch.valid).to(self.device)
            images, targets = images[partners], targets[partners]
        if self.mix is not None and len(images) % 2 == 0:  # Mixup needs an even number of images
            images, mixed = self.mix(images, targets)
            return images, mixed if self.num_classes else None
        if not self.num_classes:
            return images, None
        low = self.smoothing / self.num_classes
        smoothed = torch.full((len(images), self.num_classes), low, device=self.device)
        return images, smoothed.scatter_(1, targets[:, None], 1 - self.smoothing + low)
