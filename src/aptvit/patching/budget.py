"""How many tokens images may cost: thresholds, share and limits, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

__all__ = ["MAX_SCALES", "Budget", "CallBudget", "as_thresholds"]

MAX_SCALES = 16
"""Most patch sizes: each is twice as large as the one before, so few images have as many."""


class CallBudget(TypedDict, total=False):
    """The parts of a budget that one call can replace, see `Budget`."""

    thresholds: float | Sequence[float] | None
    keep: float | None
    max_tokens: int | None


def as_thresholds(value: float | Sequence[float]) -> tuple[float, ...]:
    """Thresholds as a tuple, from one number or a sequence.

    Raises:
        ValueError: If an element is not a number.
    """
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    if not all(isinstance(number, (int, float)) for number in values):
        raise ValueError(f"thresholds must be numbers, one for each size above the base patch; got {value!r}")
    return tuple(map(float, values))


@dataclass(frozen=True)
class Budget:
    """How many tokens images may cost.

    The number of tokens follows from thresholds, from a share, or from both with ``blend``; limits apply in all cases.
    Where a share or a limit sets the number of tokens, the patches with the lowest scores are merged first.

    Attributes:
        thresholds: From fine to coarse; a patch stays coarse where its score is strictly below.
        keep: Share of the patch tokens that every image keeps.
        blend: With thresholds and a share: interpolates each image's number of tokens between the thresholds' (0) and
            the share's (1).
        min_keep: Least share of the patch tokens that an image keeps.
        max_tokens: Most tokens of an image, prefix tokens included. Overrides ``min_keep``.
        max_batch_tokens: Most tokens of a batch, prefix tokens included. Overrides ``min_keep`` only where the batch
            cannot be reduced otherwise.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
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
        for name in ("keep", "blend", "min_keep", "max_tokens", "max_batch_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int | float | None):
                raise ValueError(f"{name}={value!r} must be a number")
        if len(self.thresholds or ()) >= MAX_SCALES:
            raise ValueError(f"{len(self.thresholds or ())} thresholds: there are at most {MAX_SCALES} patch sizes")
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
        """A budget with the same limits, and these thresholds or this share."""
        return replace(self, thresholds=thresholds, keep=keep)

    def with_thresholds(self, thresholds: float | Sequence[float]) -> Budget:
        """A budget with these thresholds instead of a share; with a blend, the share stays."""
        return self.deciding(as_thresholds(thresholds), None if self.blend is None else self.keep)

    def with_keep(self, keep: float) -> Budget:
        """A budget with this share instead of thresholds; with a blend, the thresholds stay."""
        return self.deciding(None if self.blend is None else self.thresholds, float(keep))

    def for_call(
        self,
        thresholds: float | Sequence[float] | None = None,
        keep: float | None = None,
        max_tokens: int | None = None,
    ) -> Budget:
        """The budget of one call: this budget with the given parts replaced.

        Raises:
            ValueError: As for the class; also if both thresholds and a share are given without a blend.
        """
        budget = self if max_tokens is None else replace(self, max_tokens=max_tokens)
        if thresholds is not None and keep is not None:
            return budget.deciding(as_thresholds(thresholds), float(keep))
        if thresholds is not None:
            return budget.with_thresholds(thresholds)
        return budget if keep is None else budget.with_keep(keep)
