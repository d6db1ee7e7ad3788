"""How good answers are, image by image; the interval of a mean; and two methods at equal measured time.

scores of an image                a baseline has a few settings, each with a time; in between, the
  1 ─────●                        score of an image is taken to change linearly from one setting
          ╲  baseline             to the next. The curve ends at the uniform model, which is what
  0        ●──────● uniform       any method is when it leaves nothing out.
    ──┼────┼──────┼── time
     too fast: nothing to compare with
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    *("Interval", "NotComparable", "Point", "agrees", "bootstrap_mean", "cosine", "difference_at_equal_time"),
    *("is_correct", "scores_at"),
]


def is_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the label is among the k highest logits; of equal logits the lower class counts as higher.

    Args:
        logits: (N, C).
        labels: (N,) class indices.
        k: How many guesses.

    Returns:
        (N,) bool.
    """
    # A sort that is stable gives the same answer on every machine, which topk does not promise for equal logits.
    guesses = logits.argsort(dim=1, descending=True, stable=True)[:, :k]  # (N, C) -> (N, k)
    return (guesses == labels[:, None]).any(1)


def agrees(logits: Tensor, reference: Tensor) -> Tensor:
    """Whether both have the same top-1. (N, C), (N, C) -> (N,) bool."""
    return is_correct(logits, reference.argsort(dim=1, descending=True, stable=True)[:, 0])


def cosine(logits: Tensor, reference: Tensor) -> Tensor:
    """Cosine between two sets of logits, image by image. (N, C), (N, C) -> (N,)."""
    return F.cosine_similarity(logits.double(), reference.double())


@dataclass(frozen=True)
class Interval:
    """A mean and where it would lie with other images.

    Attributes:
        mean: Of these images.
        low: Lower end of the interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is beyond what the choice of images explains."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: np.ndarray, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile interval of the mean over images drawn with replacement.

    For a paired comparison of two methods give the differences, image by image: what makes an image hard for both
    cancels, and the interval is narrower than those of the methods suggest.

    Args:
        values: (N,) one value for each image.
        samples: Number of draws.
        level: Share of the draws that the interval holds.
        seed: Of the draws; the same values and seed give the same interval.

    Raises:
        ValueError: If there are no values, or an option is out of range.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values of shape {values.shape} have no mean over images: give one value for each image")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples={samples} must be at least 1 and level={level} in (0, 1)")
    # How often each distinct value is drawn is multinomial. Answers are right or wrong, so there are few of them, and
    # 50,000 images cost no more than 50.
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=samples)
    tail = (1 - level) / 2
    low, high = np.quantile(draws @ distinct / len(values), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of a method.

    Attributes:
        time: Relative to the uniform model.
        scores: (N,) one for each image, such as right (1) or wrong (0).
    """

    time: float
    scores: np.ndarray


class NotComparable(ValueError):
    """The settings of a baseline do not reach this time; the message says how."""


def scores_at(curve: Sequence[Point], time: float) -> np.ndarray:
    """Scores of a method at a time, interpolated linearly between the two settings next to it.

    Args:
        curve: The settings, in any order.
        time: Relative to the uniform model.

    Returns:
        (N,) scores.

    Raises:
        NotComparable: If no setting is that fast, or none that slow.
    """
    points = sorted(curve, key=lambda point: point.time)
    if not points or time < points[0].time:
        raise NotComparable("no setting that fast")
    if time > points[-1].time:
        raise NotComparable("no setting that slow")
    after = bisect_left(points, time, key=lambda point: point.time)
    left, right = points[max(after - 1, 0)], points[after]
    share = 1.0 if right.time == time else (time - left.time) / (right.time - left.time)
    return (1 - share) * left.scores + share * right.scores


def difference_at_equal_time(
    point: Point, baseline: Sequence[Point], *, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of the scores minus the baseline's at equal time, with the 95 % interval over images.

    The times are taken as they were measured: the interval says what other images would change, not other rounds.

    Args:
        point: One setting of a method.
        baseline: Settings of the baseline, on the same images.
        samples: As for `bootstrap_mean`.
        seed: Of the draws.

    Raises:
        NotComparable: As for `scores_at`.
        ValueError: If the images do not pair up.
    """
    expected = scores_at(baseline, point.time)
    if expected.shape != point.scores.shape:
        raise ValueError(f"{len(point.scores)} images and {len(expected)} of the baseline do not pair up: use the same")
    return bootstrap_mean(point.scores - expected, samples=samples, seed=seed)
