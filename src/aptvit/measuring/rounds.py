"""Interleaved timing, and ratios of paired rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from aptvit.measuring.progress import Progress, silent

__all__ = ["Paired", "Ratio", "interleaved", "paired_rounds", "wait"]


@dataclass(frozen=True)
class Ratio:
    """The ratios of paired rounds.

    A format specification applies to all three numbers: ``f"{ratio:.2f}"`` is "2.00 (1.50 to 4.00)".

    Attributes:
        median: Median ratio of the rounds.
        least: Smallest ratio.
        most: Largest ratio.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of_rounds(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Ratios of the times of paired rounds.

        Args:
            above: Numerators: the seconds of each round.
            below: Denominators: the seconds of the paired rounds.

        Raises:
            ValueError: If the lists differ in length, are empty, or hold a time that is not positive.
        """
        if len(above) != len(below) or not above or min(*above, *below) <= 0:
            raise ValueError(f"{len(above)} and {len(below)} rounds: give as many of each, at least one, all positive")
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def named(self, name: str) -> dict[str, float]:
        """Three entries for a flat table: NAME (the median), NAME_least and NAME_most."""
        return {name: self.median, f"{name}_least": self.least, f"{name}_most": self.most}

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}} to {self.most:{spec}})"


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Operations and times of a uniform model and its adaptive form on the same images; base class of results.

    Attributes:
        images: Number of images in a round.
        gflops_uniform: Billions of operations per image; a multiplication and an addition are two.
        gflops_adaptive: The same for the adaptive model.
        seconds_uniform: Seconds of each round over all images, paired with the rounds of `seconds_adaptive`.
        seconds_adaptive: The same for the adaptive model.
    """

    images: int = 0
    gflops_uniform: float = 0.0
    gflops_adaptive: float = 0.0
    seconds_uniform: tuple[float, ...] = ()
    seconds_adaptive: tuple[float, ...] = ()

    @property
    def flop_ratio(self) -> float:
        """Operations of the uniform model over those of the adaptive model."""
        return self.gflops_uniform / self.gflops_adaptive

    @property
    def speedup(self) -> Ratio:
        """Time of the uniform model over that of the adaptive model, over the rounds."""
        return Ratio.of_rounds(self.seconds_uniform, self.seconds_adaptive)

    @property
    def eta(self) -> float:
        """Median speed-up over operation ratio: 1 if all saved operations became saved time."""
        return self.speedup.median / self.flop_ratio

    @property
    def throughput_uniform(self) -> float:
        """Images per second of the uniform model in the median round."""
        return self.images / statistics.median(self.seconds_uniform)

    @property
    def throughput_adaptive(self) -> float:
        """Images per second of the adaptive model in the median round."""
        return self.images / statistics.median(self.seconds_adaptive)


def wait(device: torch.device | str) -> None:
    """Wait until a device has finished its work. Does nothing for the CPU, whose calls are synchronous."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Sequence[Callable[[], Any]],
    rounds: int,
    device: torch.device | str,
    warmup: int = 0,
    progress: Progress = silent,
) -> list[list[float]]:
    """Time several calls in turn, so that disturbances of the machine affect all of them equally.

    Args:
        runs: The calls.
        rounds: Number of timed rounds. The order is reversed from one round to the next.
        device: Device of the calls.
        warmup: Rounds before the first that are not timed.
        progress: Wraps the rounds.

    Returns:
        For each call, the seconds of each round.
    """
    sides = [lambda _, run=run: run() for run in runs]
    return paired_rounds(sides, [None], rounds, device, progress, warmup)


def paired_rounds(
    sides: Sequence[Callable[[Any], Any]],
    batches: Iterable[Any],
    rounds: int,
    device: torch.device | str,
    progress: Progress = silent,
    warmup: int = 0,
) -> list[list[float]]:
    """Time several models on the same batches. Each batch goes through all models before the next batch.

    Args:
        sides: The models; each takes a batch.
        batches: Iterated once in each round.
        rounds: Number of timed rounds. The order of the models is reversed from batch to batch and from round to round.
        device: Device of the models.
        progress: Wraps the rounds.
        warmup: Rounds before the first that are not timed.

    Returns:
        For each model, the seconds of each round over all batches.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for step in progress(range(warmup + rounds), "timing", warmup + rounds):
        for times in seconds:
            times.append(0.0)
        for number, batch in enumerate(batches):
            for i in range(len(sides))[:: -1 if (step + number) % 2 else 1]:
                seconds[i][-1] += _seconds(partial(sides[i], batch), device)
    return [times[warmup:] for times in seconds]


def _seconds(run: Callable[[], Any], device: torch.device | str) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start
