"""Which task a recipe means."""

from __future__ import annotations

from typing import Any

import torch

from aptvit.hosts.pretrained import Host
from aptvit.training.recipe import Recipe
from aptvit.training.tasks.task import Task

__all__ = ["make_task"]


def make_task(recipe: Recipe, host: Host, images: Any, evaluation: Any, device: torch.device) -> Task:
    """The task that a recipe's ``objective`` names.

    Args:
        recipe: How.
        host: The pretrained model; its weights are changed.
        images: To train on: a `Source`, `aptvit.files.annotations.BoxFiles` or `MaskFiles`.
        evaluation: To evaluate on, or None.
        device: Where.

    Raises:
        ValueError: If recipe, model and images do not fit each other.
    """
    if recipe.objective == "boxes":
        from aptvit.training.tasks.detection import BoxTask

        return BoxTask(recipe, host, images, evaluation, device)
    if recipe.objective == "pixels":
        from aptvit.training.tasks.segmentation import PixelTask

        return PixelTask(recipe, host, images, evaluation, device)
    from aptvit.training.tasks.classification import ClassTask

    return ClassTask(recipe, host, images, evaluation, device)
