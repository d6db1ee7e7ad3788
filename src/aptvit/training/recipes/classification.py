"""Recipe for training on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.common import check_fractions
from aptvit.training.recipes.images import ImageRecipe

__all__ = ["ClassificationRecipe"]


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(ImageRecipe):
    """Settings for training a classifier on labels, in addition to those of `ImageRecipe` and `Recipe`.

    Attributes:
        objective: Name of the task in files.
        label_smoothing: Fraction of the target probability that is distributed over all classes.

    Raises:
        ValueError: If a value is out of range.
    """

    task: ClassVar[str] = "classification"

    objective: Literal["labels"] = "labels"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self, ["label_smoothing"])
