"""A sample of a few hundred training images, augmented or not, to calibrate thresholds and to train scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from aptvit.measuring.progress import Progress
from aptvit.training.data import DeviceAugmentation, ImageDataset, make_loader
from aptvit.training.sampler import BalancedBatches

__all__ = ["ImageSamples", "Repeatable"]

_MAX_IMAGES = 512
_BATCH_SIZE = 32


class ImageSamples:
    """Batches of training images, (B, C, H, W) on the training device; the same on all processes, to read repeatedly.

    Args:
        augmented: The images with the transform for training.
        plain: The images with the transform for evaluation.
        augment: Augmentation on the training device.
        seed: Seed of the order.
        workers: Number of processes that read images.
    """

    def __init__(
        self, augmented: ImageDataset, plain: ImageDataset, augment: DeviceAugmentation, seed: int, workers: int
    ) -> None:
        self._augmented, self._plain, self._augment = augmented, plain, augment
        self._seed, self._workers = seed, workers

    def augmented(self, epoch: int = 0) -> Repeatable:
        """Return the first images of an epoch with all augmentation: normalised, erased and mixed."""

        size = min(_BATCH_SIZE, len(self._augmented))

        def start() -> Iterator[Tensor]:
            batches = BalancedBatches(len(self._augmented), size, seed=self._seed)
            batches.epoch = epoch
            count = 0
            for batch in make_loader(self._augmented, batches, self._workers):
                yield self._augment(batch)[0][batch.valid]
                count += len(batch)
                if count >= _MAX_IMAGES:
                    return

        return Repeatable(start, -(-min(len(self._augmented), _MAX_IMAGES) // size))

    def plain(self, most: int = _MAX_IMAGES) -> Repeatable:
        """Return at most ``most`` images, spread evenly over the training images, transformed as in evaluation."""

        numbers = list(range(0, len(self._plain), max(1, -(-len(self._plain) // most))))
        batches = [numbers[i : i + _BATCH_SIZE] for i in range(0, len(numbers), _BATCH_SIZE)]

        def start() -> Iterator[Tensor]:
            for batch in make_loader(self._plain, batches, self._workers):
                yield self._augment.normalised(batch)[batch.valid]

        return Repeatable(start, len(batches))


class Repeatable:
    """An iterable that can be iterated repeatedly.

    Args:
        start: Returns a new iterator; called for each iteration.
        length: Number of steps of an iteration, if it is known.
    """

    def __init__(self, start: Callable[[], Iterator[Any]], length: int = 0) -> None:
        self._start, self.length = start, length

    def __iter__(self) -> Iterator[Any]:
        return self._start()

    def tracked(self, progress: Progress, description: str) -> Repeatable:
        """Return the same iterable with a progress bar or lines about each iteration."""
        return Repeatable(lambda: iter(progress(self._start(), description, self.length)), self.length)
