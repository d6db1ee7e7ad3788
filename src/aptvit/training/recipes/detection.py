"""Recipe for training detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.dense import DenseRecipe

__all__ = ["DetectionRecipe"]


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """Settings for training a detector on images with boxes, in addition to those of `DenseRecipe` and `Recipe`.

    Attributes:
        objective: Name of the task in files.
        masks: Whether to predict a mask for each box, trained on the outlines of COCO.
        cascade: Whether to refine boxes in three stages (Cascade R-CNN).
    """

    task: ClassVar[str] = "detection"

    objective: Literal["boxes"] = "boxes"
    masks: bool = False
    cascade: bool = False
