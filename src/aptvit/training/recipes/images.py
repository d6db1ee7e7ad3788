"""Augmentation of whole images, which classification and distillation share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aptvit.training.recipes.common import Recipe, check_fractions, check_positive

__all__ = ["ImageRecipe"]


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """Settings of trainings on whole images.

    Attributes:
        method: ``"apt"``; or a baseline: ``"uniform"``, ``"random"``, ``"resize"``, ``"downscale"``, ``"tome"``.
        trains: ``"all"`` parameters; or only the ``"new"`` ones of the method, and the classifier if it is new.
        crop: Smallest fraction of an image that a random crop holds; 1 for the evaluation transform.
        auto_augment: timm's string, such as ``rand-m9-mstd0.5-inc1``; empty for none.
        color_jitter: Strength of random colours, where ``auto_augment`` is empty.
        erasing: Probability of random erasing.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
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
