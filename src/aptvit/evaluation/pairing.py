"""Two methods at equal measured time: photo by photo, the rival read off its curve at the time of the other.

scores of a photo                 a rival has a few settings, each with a time; in between, its
  1 ─────●                        score of a photo is taken to change linearly from one setting
          ╲  rival                to the next. Its curve ends at the uniform model, which is what
  0        ●──────● uniform       any method is when it leaves nothing out.
    ──┼────┼──────┼── time
     too fast: nothing to compare with
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aptvit.evaluation.bootstrap import Interval, bootstrap_mean

__all__ = ["NotComparable", "Point", "difference_at_equal_time", "scores_at"]


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of a method.

    Attributes:
        time: Measured, relative to the uniform model.
        scores: (N,) one for each photo, such as right (1) or wrong (0).
    """

    time: float
    scores: np.ndarray


class NotComparable(ValueError):
    """The rival's settings do not reach this time; the message says how."""


def scores_at(curve: Sequence[Point], time: float) -> np.ndarray:
    """Scores of a method at a time, interpolated linearly between the two settings next to it.

    Args:
        curve: Its settings, in any order.
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
    after = next(i for i, point in enumerate(points) if point.time >= time)
    right = points[after]
    if right.time == time:
        return np.asarray(right.scores, dtype=np.float64)
    left = points[after - 1]
    share = (time - left.time) / (right.time - left.time)
    return (1 - share) * left.scores + share * right.scores


def difference_at_equal_time(ours: Point, rival: Sequence[Point], *, samples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of our scores minus the rival's at our time, with its 95 % interval over photos.

    The times are taken as they were measured: the interval says what other photos would change, not other rounds.

    Args:
        ours: One setting of ours.
        rival: Settings of the rival, on the same photos.
        samples: As for `bootstrap_mean`.
        seed: Likewise.

    Raises:
        NotComparable: As for `scores_at`.
        ValueError: If the photos do not pair up.
    """
    theirs = scores_at(rival, ours.time)
    if theirs.shape != ours.scores.shape:
        raise ValueError(f"{len(ours.scores)} photos and {len(theirs)} of the rival do not pair up: use the same ones")
    return bootstrap_mean(ours.scores - theirs, samples=samples, seed=seed)
