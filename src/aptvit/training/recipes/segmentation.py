"""Training of segmenters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.common import check_fractions
from aptvit.training.recipes.dense import DenseRecipe

__all__ = ["SegmentationRecipe"]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """How a segmenter is trained on images with a class for each pixel.

    Attributes:
        objective: Names the task in files.
        test_size: Longer side of images in evaluation, in pixels; 0 leaves them as they are.
        slide: Evaluate in overlapping squares of ``size``.
        distort: Probability of random colours.
        depths: The four blocks that are read, counted from 0; by default the last of each quarter.
        ignore: Values in the masks that belong to no class.
        subtract: 1 where masks count classes from 1 and have 0 for none, as ADE20K's do.
    """

    task: ClassVar[str] = "segmentation"

    objective: Literal["pixels"] = "pixels"
    test_size: int = 0
    slide: bool = False
    distort: float = 0.5
    depths: tuple[int, ...] = ()
    ignore: tuple[int, ...] = (255,)
    subtract: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self, ["distort"])
