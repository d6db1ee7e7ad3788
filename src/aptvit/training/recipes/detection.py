"""Training of detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.dense import DenseRecipe

__all__ = ["DetectionRecipe"]


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """How a detector is trained on images with boxes.

    Attributes:
        objective: Names the task in files.
        masks: Also predict a mask for each box, from COCO's outlines.
        cascade: Three stages of boxes (Cascade R-CNN).
    """

    task: ClassVar[str] = "detection"

    objective: Literal["boxes"] = "boxes"
    masks: bool = False
    cascade: bool = False
