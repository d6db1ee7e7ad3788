"""Shared parts of the tasks detection and segmentation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.hosts.pretrained import Host
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.budget import Budget
from aptvit.scorers.preview import as_in_evaluation
from aptvit.scorers.sizes import Answers
from aptvit.training.data import make_loader
from aptvit.training.methods import build_model, set_drop_path
from aptvit.training.recipes.dense import DenseRecipe
from aptvit.training.sampler import Draw
from aptvit.training.speed import training_speedup
from aptvit.training.tasks.task import Task

__all__ = [
    "MapTeacher",
    "adaptive_backbone",
    "check_start",
    "evaluation_outputs",
    "freeze_heads",
    "freeze_unused",
    "merging_disabled",
    "step_speedup",
    "window_pixels",
]


def adaptive_backbone(host: Host, recipe: DenseRecipe) -> AdaptivePatchTransformer:
    """Build the adaptive model from a host: without a classifier, with windows, and without merging for ``uniform``.

    Args:
        host: The pretrained model; its classifier is removed.
        recipe: Method, windows and stochastic depth.
    """
    vit: Any = host.model
    vit.reset_classifier(0)
    set_drop_path(vit, recipe.drop_path)
    windows: dict[str, Any] = {}
    if recipe.window:
        windows = {"window_size": recipe.window, "global_blocks": recipe.global_blocks}
    if recipe.method == "uniform":
        return AdaptivePatchTransformer(vit, resize_only=True, pad=True, **windows)
    model: AdaptivePatchTransformer = build_model(vit, recipe, pad=True, **windows)
    return model


def freeze_unused(model: AdaptivePatchTransformer, last_block: int) -> None:
    """Freeze parameters that the maps do not depend on: distributed training waits for gradients of all others.

    Args:
        model: The backbone.
        last_block: Number of the last block whose output is used.
    """
    vit = model.adapter.vit
    unused = [getattr(vit, name, None) for name in ("norm", "fc_norm", "attn_pool", "head")]
    for module in (*unused, *vit.blocks[last_block + 1 :]):
        if isinstance(module, nn.Module):
            module.requires_grad_(False)


def check_start(recipe: DenseRecipe, folder: Path | None) -> None:
    """Raise ValueError if the recipe needs a training to start from and there is none."""
    if recipe.from_maps and folder is None:
        raise ValueError("from_maps=true needs a trained uniform network as the teacher: name it with --start")


def freeze_heads(network: Any) -> None:
    """Freeze the layers after the feature maps, which have no gradients in a loss of the maps."""
    for name, parameter in network.named_parameters():
        if not name.startswith(("backbone.model.", "backbone.cell_detail.")):
            parameter.requires_grad_(False)


def evaluation_outputs(network: nn.Module, model: AdaptivePatchTransformer, outputs: Answers) -> Answers:
    """Wrap a function such that it computes the outputs of a network in eval mode with merging disabled.

    Args:
        network: The whole network.
        model: The adaptive model inside.
        outputs: Computes outputs of the network, (B, C, H, W) normalised images -> (B, K, H', W').

    Returns:
        The wrapped function.
    """

    def wrapped(images: Tensor) -> Tensor:
        with merging_disabled(model), as_in_evaluation(network, model):
            return outputs(images)

    return wrapped


class MapTeacher:
    """Computes feature maps with a frozen copy of a backbone, with merging disabled.

    Args:
        backbone: Backbone of the network; it is copied.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
        model = self.backbone.model
        model.thresholds = (-1.0,) * (model.num_scales - 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Compute the maps of (B, C, H, W) normalised images: (B, D, h, w) for each depth."""
        maps: list[Tensor] = self.backbone.maps(images)
        return maps


@contextmanager
def merging_disabled(model: AdaptivePatchTransformer) -> Iterator[None]:
    """Context in which the model merges no patches."""
    budget = model.budget
    model.budget = Budget((-1.0,) * (model.num_scales - 1))
    try:
        yield
    finally:
        model.budget = budget


def window_pixels(model: AdaptivePatchTransformer) -> int:
    """Return the side of an attention window in pixels; 1 without windows."""
    return 1 if model.window_size is None else model.patch_size * model.window_size


def step_speedup(task: Task, batch_size: int, accelerator: Any, progress: Progress = silent) -> Ratio:
    """Time forward and backward passes of the whole network, with merging disabled and with its current budget.

    Args:
        task: The task.
        batch_size: Largest number of images; the first images are used.
        accelerator: accelerate's Accelerator.
        progress: Wraps the rounds.

    Returns:
        Time without merging over time with merging.
    """
    model = task.model
    size = min(batch_size, len(task.images))
    (batch,) = make_loader(task.images, [[Draw(i, 0) for i in range(size)]], 0)
    learner, adaptive = task.learner(task.network), model.budget

    def loss(budget: Any) -> Tensor:
        model.budget = budget
        return task.losses(learner, batch, accelerator).per_image.mean()

    with merging_disabled(model):
        uniform = model.budget
        return training_speedup(lambda: loss(uniform), lambda: loss(adaptive), (task.network,), accelerator, progress)
