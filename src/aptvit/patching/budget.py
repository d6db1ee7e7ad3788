"""How many tokens images may cost: what a user sets, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

__all__ = ["Budget", "CallBudget", "as_thresholds"]


class CallBudget(TypedDict, total=False):
    """What one call may say instead of the model's own budget."""

    thresholds: float | Sequence[float] | None
    keep: float | None
    max_tokens: int | None


def as_thresholds(value: float | Sequence[float]) -> tuple[float, ...]:
    """A number or several, as a tuple.

    Raises:
        ValueError: If one is no number.
    """
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    if not all(isinstance(number, (int, float)) for number in values):
        raise ValueError(f"thresholds must be numbers, one for each size above the base patch; got {value!r}")
    return tuple(map(float, values))


@dataclass(frozen=True)
class Budget:
    """How many tokens images may cost.

    Thresholds decide, or a share, or both with ``blend``; limits hold whatever decides. Where they move an image's
    number of tokens, the patches that score lowest are merged first, as a share does it.

    Attributes:
        thresholds: From fine to coarse; a patch is kept coarse where its score is strictly below.
        keep: Share of its patch tokens that every image keeps.
        blend: With thresholds and a share: each image's number of tokens lies between what the two give it, at 0 that
            of the thresholds, at 1 that of the share.
        min_keep: Share of its patch tokens that no image falls below.
        max_tokens: Tokens that no image exceeds, prefix tokens included. Stronger than ``min_keep``.
        max_batch_tokens: Tokens that no batch exceeds, prefix tokens included. Stronger than ``min_keep``, which it
            leaves alone for as long as it can.

    Raises:
        ValueError: If a number is out of range, or two of them contradict each other.
    """

    thresholds: tuple[float, ...] | None = None
    keep: float | None = None
    blend: float | None = None
    min_keep: float = 0.0
    max_tokens: int | None = None
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.thresholds is not None and not all(isinstance(t, (int, float)) and t == t for t in self.thresholds):
            raise ValueError(
                f"thresholds must be numbers, one for each size above the base patch; got {self.thresholds!r}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} must be a share of the patch tokens in (0, 1]")
        if self.blend is None and self.thresholds is not None and self.keep is not None:
            raise ValueError(
                f"give thresholds={self.thresholds!r} or keep={self.keep!r}, not both: each decides what is merged. "
                "blend=0.5 takes the middle"
            )
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise ValueError(f"blend={self.blend!r} must be in [0, 1]: 0 is what thresholds give, 1 is what keep gives")
        if self.blend is not None and (self.thresholds is None) != (self.keep is None):
            raise ValueError(f"blend={self.blend:g} needs both thresholds and keep, or calibrate(), which finds them")
        if not 0 <= self.min_keep <= 1:
            raise ValueError(f"min_keep={self.min_keep!r} must be a share of the patch tokens in [0, 1]")
        if self.keep is not None and self.min_keep > self.keep:
            raise ValueError(f"min_keep={self.min_keep:g} is above keep={self.keep:g}: no image could keep so few")
        for name in ("max_tokens", "max_batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")

    def deciding(self, thresholds: tuple[float, ...] | None, keep: float | None) -> Budget:
        """The same limits with other thresholds, or another share."""
        return replace(self, thresholds=thresholds, keep=keep)

    def with_thresholds(self, thresholds: float | Sequence[float]) -> Budget:
        """Thresholds decide instead of a share; a blend keeps both."""
        return self.deciding(as_thresholds(thresholds), None if self.blend is None else self.keep)

    def with_keep(self, keep: float) -> Budget:
        """A share decides instead of thresholds; a blend keeps both."""
        return self.deciding(None if self.blend is None else self.thresholds, float(keep))

    def for_call(
        self,
        thresholds: float | Sequence[float] | None = None,
        keep: float | None = None,
        max_tokens: int | None = None,
    ) -> Budget:
        """The budget of one call.

        Raises:
            ValueError: As for the class; also if both thresholds and a share are given.
        """
        budget = self if max_tokens is None else replace(self, max_tokens=max_tokens)
        if thresholds is not None and keep is not None:
            return budget.deciding(as_thresholds(thresholds), float(keep))
        if thresholds is not None:
            return budget.with_thresholds(thresholds)
        return budget if keep is None else budget.with_keep(keep)
