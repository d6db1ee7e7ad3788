"""A few hundred of the training images, augmented or plain, for calibration and for scorers that are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from aptvit.training.data import DeviceAugmentation, ImageDataset, make_loader
from aptvit.training.sampler import BalancedBatches

__all__ = ["ImageSamples", "Repeatable"]

_MOST = 512
_BATCH = 32


class ImageSamples:
    """Batches of training images on the training device, the same on all processes; can be read repeatedly.

    Args:
        augmented: The images through the training transform.
        plain: The same through the evaluation transform.
        augment: Augmentation on the training device.
        seed: Of the order.
        workers: Processes that read.
    """

    def __init__(
        self, augmented: ImageDataset, plain: ImageDataset, augment: DeviceAugmentation, seed: int, workers: int
    ) -> None:
        self._augmented, self._plain, self._augment = augmented, plain, augment
        self._seed, self._workers = seed, workers

    def trained(self, epoch: int = 0) -> Repeatable:
        """The first images of an epoch, as they are trained on: normalised, erased, mixed."""

        def start() -> Iterator[Tensor]:
            batches = BalancedBatches(len(self._augmented), min(_BATCH, len(self._augmented)), seed=self._seed)
            batches.epoch = epoch
            seen = 0
            for batch in make_loader(self._augmented, batches, self._workers):
                yield self._augment(batch)[0][batch.valid]
                seen += len(batch)
                if seen >= _MOST:
                    return

        return Repeatable(start)

    def plain(self, most: int = _MOST) -> Repeatable:
        """Images spread over all, as they are evaluated; never the evaluation images themselves."""

        def start() -> Iterator[Tensor]:
            numbers = list(range(0, len(self._plain), max(1, -(-len(self._plain) // most))))
            batches = [numbers[i : i + _BATCH] for i in range(0, len(numbers), _BATCH)]
            for batch in make_loader(self._plain, batches, self._workers):
                yield self._augment.normalised(batch)[batch.valid]

        return Repeatable(start)


class Repeatable:
    """An iterable that calls ``start`` for each iteration."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()
