"""Training on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.common import check_fractions
from aptvit.training.recipes.images import ImageRecipe

__all__ = ["ClassificationRecipe"]


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(ImageRecipe):
    """How a classifier is trained on labels.

    Attributes:
        objective: Names the task in files.
        label_smoothing: Fraction of the target that is spread over all classes.
    """

    task: ClassVar[str] = "classification"

    objective: Literal["labels"] = "labels"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self, ["label_smoothing"])
