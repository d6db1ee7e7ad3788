"""Training without labels: the uniform model, with the weights it came with, is the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.common import check_fractions, check_positive
from aptvit.training.recipes.images import ImageRecipe

__all__ = ["DistillationRecipe"]


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(ImageRecipe):
    """How an adaptive classifier is trained to answer as the uniform model does. No labels are read.

    Attributes:
        objective: Names the task in files.
        temperature: Of the teacher's probabilities.
        logits_weight: Weight of the divergence from the teacher's probabilities.
        pooled_weight: Weight of the distance to the teacher's pooled features.
        features_weight: Weight of the distance to its feature maps.
        feature_depths: Depths of these maps, as fractions of the number of blocks.
        interpolate: At the end, take the weights between the initial and the trained ones, at most this fraction of the
            way, that agree best with the teacher on the validation images; 0 keeps the trained ones (their average,
            with ``ema``). Trainings on few images can go too far, most of all for images of another kind.
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
