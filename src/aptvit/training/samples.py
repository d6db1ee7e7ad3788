"""A few hundred of the training images, to find thresholds on and to teach scorers: as trained on, and as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from aptvit.training.data import DeviceAugmentation, Pictures, make_loader
from aptvit.training.sampler import BalancedBatches

__all__ = ["Again", "ImageSamples"]

_MOST = 512
_BATCH = 32


class ImageSamples:
    """Batches of training images on the training device, the same on all processes; can be read again and again.

    Args:
        augmented: The images through the training transform.
        plain: The same through the evaluation transform.
        augment: The rest of augmentation.
        seed: Of the order.
        workers: Processes that read.
    """

    def __init__(
        self, augmented: Pictures, plain: Pictures, augment: DeviceAugmentation, seed: int, workers: int
    ) -> None:
        self._augmented, self._plain, self._augment = augmented, plain, augment
        self._seed, self._workers = seed, workers

    def trained(self, epoch: int = 0) -> Again:
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

        return Again(start)

    def plain(self, most: int = _MOST) -> Again:
        """Images spread over all, as evaluation shows them. Not those evaluated: what is judged must not choose."""

        def start() -> Iterator[Tensor]:
            numbers = list(range(0, len(self._plain), max(1, -(-len(self._plain) // most))))
            batches = [numbers[i : i + _BATCH] for i in range(0, len(numbers), _BATCH)]
            for batch in make_loader(self._plain, batches, self._workers):
                yield self._augment.normalised(batch)[batch.valid]

        return Again(start)


class Again:
    """Starts anew each time that it is iterated."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return self._start()
