"""Training of adaptive models: recipes, and the training loop, which runs on accelerate.

May import `aptvit.report` and all below it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from aptvit.datasets.find_sources import find_sources
from aptvit.datasets.sources import hold_back, photos
from aptvit.training.recipe import RECIPES, Recipe, load_recipe
from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe

if TYPE_CHECKING:
    from aptvit.training.in_memory import Trained, finetune, heal
    from aptvit.training.trainer import Training

__all__ = [
    "RECIPES",
    "ClassificationRecipe",
    "DetectionRecipe",
    "DistillationRecipe",
    "Recipe",
    "SegmentationRecipe",
    "Trained",
    "Training",
    "find_sources",
    "finetune",
    "heal",
    "hold_back",
    "load_recipe",
    "photos",
]


def __getattr__(name: str) -> Any:
    module = {"Training": "trainer", "Trained": "in_memory", "finetune": "in_memory", "heal": "in_memory"}.get(name)
    if module is not None:  # imports torch, which recipes and sources do not need
        return getattr(importlib.import_module(f"aptvit.training.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
