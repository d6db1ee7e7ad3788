"""Batches for training: read and augmented in workers, normalised, erased and mixed on the training device.

What happens to an image depends on seed, epoch and the image alone, whichever worker or process reads it, so a training
that was interrupted continues with the same images.
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

from aptvit.files.images import ImageError
from aptvit.files.sources import UNLABELLED, Source
from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.images import ImageRecipe
from aptvit.training.sampler import FILLER, Draw

__all__ = ["Batch", "DeviceAugmentation", "ImageDataset", "make_loader"]


@dataclass(frozen=True)
class Batch:
    """Images as workers give them.

    Attributes:
        images: (B, C, H, W) uint8, or as many (C, H, W) of different sizes; gray where a file cannot be read.
        targets: (B,) classes, -1 for none; (B, H, W) classes of pixels; or for each image a dict of boxes and labels.
        valid: (B,) False where a file cannot be read: such an image has no weight in the loss.
        index: (B,) numbers of the images.
        problems: Why files cannot be read.
    """

    images: Any
    targets: Any
    valid: Tensor
    index: Tensor
    problems: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """In memory that copies to a GPU by itself."""
        images, targets, valid, index = (
            _mapped(part, Tensor.pin_memory) for part in (self.images, self.targets, self.valid, self.index)
        )
        return Batch(images, targets, valid, index, self.problems)

    def parts(self, number: int) -> list[Batch]:
        """Parts of nearly equal size; each holds at least one image, without weight where there are too few."""
        chosen = torch.arange(max(len(self), number))
        filler = chosen >= len(self)
        chosen[filler] = 0
        valid = self.valid[chosen] & ~filler
        parts = zip(chosen.tensor_split(number), valid.tensor_split(number), strict=True)
        return [
            Batch(_at(self.images, which), _at(self.targets, which), weight, self.index[which], [])
            for which, weight in parts
        ]


def _at(values: Any, chosen: Tensor) -> Any:
    return values[chosen] if isinstance(values, Tensor) else [values[i] for i in chosen.tolist()]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(part, change) for name, part in value.items()}
    return [_mapped(part, change) for part in value]


class ImageDataset(Dataset[tuple[Tensor, int, bool, int, str]]):
    """A source through a transform.

    Args:
        source: The images.
        data: timm's data configuration of the model: size, interpolation, crop.
        recipe: Augmentation; None for the evaluation transform.
    """

    def __init__(self, source: Source, data: dict[str, Any], recipe: ImageRecipe | None = None) -> None:
        self.source = source
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
            return torch.as_tensor(self.transform(image)), label, True, index, ""


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
    """Everything random inside follows from the seed; outside nothing changes."""
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
    """A single tensor, where the values are numbers or tensors of the same shape."""
    if isinstance(values[0], int):
        return torch.tensor(values)
    if isinstance(values[0], Tensor) and all(value.shape == values[0].shape for value in values):
        return torch.stack(list(values))
    return list(values)


def make_loader(dataset: Dataset[Any], batches: Any, workers: int, pin: bool = False) -> DataLoader[Batch]:
    """A loader that reads lists of `Draw` or of numbers from ``batches``.

    Args:
        dataset: Gives (image, target, whether it could be read, number, problem) for a `Draw` or a number.
        batches: Lists of them.
        workers: Processes that read; 0 for this one. They stay for as long as the loader does: starting them takes
            seconds where they are not forked.
        pin: Pin memory, for a GPU.
    """
    return DataLoader(
        cast(Dataset[Batch], dataset),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_one_thread if workers else None,
        generator=torch.Generator(),  # a loader that is started again must not draw from the training's generator
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


class DeviceAugmentation:
    """The part of augmentation that runs on the training device: normalise, erase, mix.

    Args:
        data: timm's data configuration.
        recipe: How much; None for normalisation only.
        num_classes: Of the targets; 0 without labels, and then images are mixed and targets are not.
        device: Where.
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
        """(B, C, H, W) images, neither erased nor mixed."""
        return (batch.images.to(self.device, non_blocking=True).float() / 255 - self.mean) / self.std

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) normalised images and, with labels, (B, classes) targets that sum to one."""
        images = self.normalised(batch)
        if self.erase is not None:
            images = self.erase(images)
        targets = batch.targets.clamp(0, max(self.num_classes - 1, 0)).to(self.device, non_blocking=True)
        if self.mix is not None and len(images) % 2 == 0:  # it mixes in pairs
            images, mixed = self.mix(images, targets)
            return images, mixed if self.num_classes else None
        if not self.num_classes:
            return images, None
        off = self.smoothing / self.num_classes
        spread = torch.full((len(images), self.num_classes), off, device=self.device)
        return images, spread.scatter_(1, targets[:, None], 1 - self.smoothing + off)
