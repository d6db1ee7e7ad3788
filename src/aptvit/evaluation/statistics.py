"""Scores of images, the interval of a mean over images, and differences of two methods at equal time.

score of an image                A baseline has a few settings, each with a time. Between two settings,
  1 ─────●                       the score of an image is interpolated linearly. The curve ends at the
          ╲  baseline            uniform model, which is the limit of every method that omits nothing.
  0        ●──────● uniform
    ──┼────┼──────┼── time
     faster than all settings: not comparable
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Interval",
    "Point",
    "agrees",
    "bootstrap_mean",
    "difference_at_equal_time",
    "divergences",
    "is_correct",
]


def is_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the label is among the k highest logits; of equal logits the lower class counts as higher.

    Args:
        logits: (N, C).
        labels: (N,) class indices.
        k: Number of classes.

    Returns:
        (N,) bool.
    """
    # A stable sort gives the same classes on every machine, which topk does not guarantee for equal logits.
    classes = logits.argsort(dim=1, descending=True, stable=True)[:, :k]  # (N, C) -> (N, k)
    return (classes == labels[:, None]).any(1)


def agrees(logits: Tensor, reference: Tensor) -> Tensor:
    """Whether both have the same top-1 class. (N, C), (N, C) -> (N,) bool."""
    return is_correct(logits, reference.argsort(dim=1, descending=True, stable=True)[:, 0])


def divergences(logits: Tensor, reference: Tensor) -> tuple[float, ...]:
    """Kullback-Leibler divergence of the classes of each image from those of a reference, in nats.

    Args:
        logits: (N, C).
        reference: (N, C).
    """
    logs, right = logits.double().log_softmax(1), reference.double().log_softmax(1)
    values = F.kl_div(logs, right, log_target=True, reduction="none").sum(1)
    return tuple(np.round(values.numpy(), 6).tolist())


@dataclass(frozen=True)
class Interval:
    """A mean over images, with its 95 % interval over other images.

    Attributes:
        mean: Mean over these images.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, samples: int = 10_000) -> Interval:
    """Percentile interval of the mean over images drawn with replacement; the draws are the same in each call.

    For a paired comparison of two methods give the differences, image by image: images that are hard for both methods
    cancel, and the interval is narrower than those of the methods.

    Args:
        values: (N,) one value for each image.
        samples: Number of draws.

    Raises:
        ValueError: If there are no values or no draws.
    """
    if len(values) == 0 or samples < 1:
        raise ValueError(f"{len(values)} values, {samples} draws: give at least one of each")
    # Counts of the distinct values in a draw are multinomial: the same distribution as drawing images, in less memory.
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=samples)
    low, high = np.quantile(draws @ distinct / len(values), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Point:
    """A setting of a method.

    Attributes:
        time: Time relative to the uniform model.
        scores: (N,) score of each image, such as correct (1) or wrong (0).
    """

    time: float
    scores: np.ndarray


def difference_at_equal_time(point: Point, baseline: Sequence[Point]) -> tuple[Interval | None, str]:
    """Mean difference of the scores from the baseline's at equal time, with its interval over images.

    Scores of the baseline are interpolated linearly between the two nearest settings. The interval is for other images,
    not for other rounds of timing: the times are taken as measured.

    Args:
        point: A setting of a method.
        baseline: Settings of the baseline, in any order, on the same images.

    Returns:
        The interval and an empty text; or None and the reason if all settings are slower, or all are faster.
    """
    curve, time = sorted(baseline, key=lambda setting: setting.time), point.time
    if not curve or time < curve[0].time:
        return None, "no setting that fast"
    if time > curve[-1].time:
        return None, "no setting that slow"
    after = bisect_left(curve, time, key=lambda setting: setting.time)
    left, right = curve[max(after - 1, 0)], curve[after]
    share = 1.0 if right.time == time else (time - left.time) / (right.time - left.time)
    return bootstrap_mean(point.scores - ((1 - share) * left.scores + share * right.scores)), ""
