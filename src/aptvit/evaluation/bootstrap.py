"""How sure is a mean over photos? Bootstrap intervals: what other photos of the same kind would have given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap_mean"]


@dataclass(frozen=True)
class Interval:
    """A mean and where it would lie with other photos.

    Attributes:
        mean: Of these photos.
        low: Lower end of the interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is beyond what the choice of photos explains."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: np.ndarray, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile interval of the mean over photos drawn with replacement.

    For a paired comparison of two methods give the differences, photo by photo: what makes a photo hard for both
    cancels, and the interval is narrower than those of the methods suggest.

    Args:
        values: (N,) one value for each photo.
        samples: How often photos are drawn.
        level: Share of the draws that the interval holds.
        seed: Of the draws; the same values and seed give the same interval.

    Raises:
        ValueError: If there are no values, or an option is out of range.
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values of shape {values.shape} have no mean over photos: give one value for each photo")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"samples={samples} must be at least 1 and level={level} in (0, 1)")
    # How often each distinct value is drawn is multinomial. Answers are right or wrong, so there are few of them, and
    # 50,000 photos cost no more than 50.
    distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=samples)
    tail = (1 - level) / 2
    low, high = np.quantile(draws @ distinct / len(values), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))
