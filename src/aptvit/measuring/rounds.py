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
    """Ratios of paired rounds.

    A format applies to all three numbers: ``f"{ratio:.2f}"`` is "2.00 (1.50 to 4.00)".

    Attributes:
        median: The median over the rounds.
        least: The smallest.
        most: The largest.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of_rounds(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Ratios of round i of one list to round i of the other.

        Raises:
            ValueError: If the lists do not pair up, are empty, or hold a time that is not positive.
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
    """A uniform model and its adaptive form on the same images; base of results.

    Attributes:
        images: Images of a round.
        gflops_uniform: Billions of operations per image; a multiply and an add count as two.
        gflops_adaptive: The same for the adaptive model.
        seconds_uniform: Seconds of each round, all images; round i is paired with round i of the other list.
        seconds_adaptive: The same for the adaptive model.
    """

    images: int = 0
    gflops_uniform: float = 0.0
    gflops_adaptive: float = 0.0
    seconds_uniform: tuple[float, ...] = ()
    seconds_adaptive: tuple[float, ...] = ()

    @property
    def flop_ratio(self) -> float:
        """Operations of the uniform over those of the adaptive model."""
        return self.gflops_uniform / self.gflops_adaptive

    @property
    def speedup(self) -> Ratio:
        """Time of the uniform over that of the adaptive model, over the rounds."""
        return Ratio.of_rounds(self.seconds_uniform, self.seconds_adaptive)

    @property
    def eta(self) -> float:
        """Median speed-up over operation ratio: how much of the saved operations became saved time, 1 is all."""
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
    """Wait until a device has finished its work; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Sequence[Callable[[], Any]], rounds: int, device: torch.device | str, first: int = 0, warmup: int = 0
) -> list[list[float]]:
    """Time several runs in turn, so that what disturbs the machine disturbs all of them alike.

    Args:
        runs: What is timed.
        rounds: Number of timed rounds. The order is reversed from one round to the next.
        device: Where they work.
        first: Number of the first round: odd ones go backwards.
        warmup: Rounds before the first that are not timed.

    Returns:
        For each run, the seconds of each round.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(first - warmup, first + rounds):
        for number in range(len(runs))[:: -1 if step % 2 else 1]:
            taken = _seconds(runs[number], device)
            if step >= first:
                seconds[number].append(taken)
    return seconds


def paired_rounds(
    sides: Sequence[Callable[[Any], Any]],
    batches: Iterable[Any],
    rounds: int,
    device: torch.device | str,
    progress: Progress = silent,
) -> list[list[float]]:
    """Time several sides over the same batches: a batch goes through all of them before the next one.

    Args:
        sides: What is timed; each takes a batch. Warm them up before.
        batches: Iterated once in each round.
        rounds: Number of rounds. The order of the sides changes with each batch and each round.
        device: Where they work.
        progress: Wraps the rounds.

    Returns:
        For each side, the seconds of each round over all batches.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    for step in progress(range(rounds), "timing", rounds):
        totals = [0.0] * len(sides)
        for number, batch in enumerate(batches):
            times = interleaved([partial(side, batch) for side in sides], 1, device, first=step + number)
            totals = [total + taken for total, (taken,) in zip(totals, times, strict=True)]
        for of_side, total in zip(seconds, totals, strict=True):
            of_side.append(total)
    return seconds


def _seconds(run: Callable[[], Any], device: torch.device | str) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start
