"""Recipe for training segmenters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aptvit.training.recipes.common import check_fractions
from aptvit.training.recipes.dense import DenseRecipe

__all__ = ["SegmentationRecipe"]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """Settings for training a segmenter on images with a class for each pixel, in addition to those of `DenseRecipe`.

    Attributes:
        objective: Name of the task in files.
        test_size: Longer side of images in evaluation, in pixels; 0 does not resize them.
        slide: Whether to evaluate in overlapping squares of ``size``.
        distort: Probability of random changes of colour.
        depths: Numbers of the four blocks whose feature maps are used, counted from 0; by default the last of each
            quarter.
        ignore: Values in the masks that belong to no class.
        subtract: 1 if masks count classes from 1 and use 0 for no class, as in ADE20K.
        colours: Colours of the classes in masks: ``voc``, ``cityscapes``, ``ade20k``, or a file; see
            `aptvit.dense.find_masks`.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
    """

    task: ClassVar[str] = "segmentation"

    objective: Literal["pixels"] = "pixels"
    test_size: int = 0
    slide: bool = False
    distort: float = 0.5
    depths: tuple[int, ...] = ()
    ignore: tuple[int, ...] = (255,)
    subtract: int = 0
    colours: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self, ["distort"])
