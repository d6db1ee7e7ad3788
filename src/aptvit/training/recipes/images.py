"""Recipe settings that classification and distillation share: methods, and augmentation of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aptvit.training.recipes.common import Recipe, check_fractions, check_positive

__all__ = ["ImageRecipe"]


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """Settings for training a classifier, with or without labels, in addition to those of `Recipe`.

    Attributes:
        method: ``"apt"``, or a baseline: ``"uniform"``, ``"random"``, ``"resize"``, ``"downscale"``, ``"tome"``.
        trains: The parameters that are trained: ``"all"``, or the ``"new"`` parameters of the method and, if it is new,
            the classifier.
        crop: Smallest fraction of the area of an image in a random crop; 1 for the evaluation transform.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``; empty for none.
        color_jitter: Strength of random colours, where ``auto_augment`` is empty.
        erasing: Probability of random erasing.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.

    Raises:
        ValueError: If a value is out of range, or the scorer needs a detector or segmenter.
    """

    method: Literal["apt", "uniform", "random", "resize", "downscale", "tome"] = "apt"
    trains: Literal["all", "new"] = "all"
    crop: float = 1.0
    auto_augment: str = ""
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ["crop"])
        check_fractions(self, ["crop", "erasing"])
        if self.scorer == "spread":
            raise ValueError("scorer=spread predicts the outputs of a detector or segmenter: objective=boxes or pixels")
