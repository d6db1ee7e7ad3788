"""Recipe for training without labels: the teacher is the uniform model with its pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.common import check_fractions, check_positive
from aptvit.training.recipes.images import ImageRecipe

__all__ = ["DistillationRecipe"]


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(ImageRecipe):
    """Settings for distilling the uniform model without labels, in addition to those of `ImageRecipe` and `Recipe`.

    Attributes:
        objective: Name of the task in files.
        temperature: Temperature of the probabilities of teacher and student.
        logits_weight: Weight of the divergence from the teacher's probabilities.
        pooled_weight: Weight of the distance to the teacher's pooled features.
        features_weight: Weight of the distance to the teacher's feature maps.
        feature_depths: Depths of the feature maps, as fractions of the number of blocks.
        interpolate: At the end, interpolate between initial weights (0) and trained weights (1), up to this fraction,
            and keep those that agree best with the teacher on the validation images. 0 keeps the trained weights, or
            with ``ema`` their average. Trained on few images, the interpolated weights agree better on other images.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
    """

    task: ClassVar[str] = "distillation"

    objective: Literal["distill"] = "distill"
    temperature: float = 1.0
    logits_weight: float = 1.0
    pooled_weight: float = 0.0
    features_weight: float = 0.0
    feature_depths: tuple[float, ...] = (1.0,)
    interpolate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ["temperature"])
        check_fractions(self, ["interpolate"])
        if any(not 0 < depth <= 1 for depth in self.feature_depths):
            raise ValueError(
                f"feature_depths={self.feature_depths} must be fractions of the number of blocks, above 0 and up to 1"
            )
        if self.interpolate and self.shard:
            raise ValueError("interpolate needs whole weights: set shard=false, or interpolate=0")
