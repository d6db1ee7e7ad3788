"""Create the task of a recipe."""

from __future__ import annotations

from typing import Any

import torch

from aptvit.hosts.pretrained import Host
from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.common import Recipe
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.tasks.task import Task

__all__ = ["make_task"]


def make_task(recipe: Recipe, host: Host, images: Any, evaluation: Any, device: torch.device) -> Task:
    """Create the task of a recipe.

    Args:
        recipe: Recipe of the task.
        host: The pretrained model; its weights are changed.
        images: Images to train on: a `aptvit.datasets.sources.Source`, or `BoxFiles` or `MaskFiles` of
            `aptvit.datasets`.
        evaluation: Images to evaluate on, of the same type, or None.
        device: The training device.

    Raises:
        ValueError: If recipe, model and images do not fit together.
    """
    if isinstance(recipe, DetectionRecipe):
        from aptvit.training.tasks.detection import BoxTask

        return BoxTask(recipe, host, images, evaluation, device)
    if isinstance(recipe, SegmentationRecipe):
        from aptvit.training.tasks.segmentation import PixelTask

        return PixelTask(recipe, host, images, evaluation, device)
    if not isinstance(recipe, (ClassificationRecipe, DistillationRecipe)):
        raise ValueError(f"{type(recipe).__name__} has no task: use load_recipe, or the recipe class of the task")
    from aptvit.training.tasks.classification import ClassTask

    return ClassTask(recipe, host, images, evaluation, device)
