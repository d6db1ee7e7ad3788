"""What training of detectors and of segmenters has in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.hosts.pretrained import Host
from aptvit.measuring.rounds import Ratio
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.budget import Budget
from aptvit.scorers.preview import as_in_evaluation
from aptvit.scorers.spread import Answers
from aptvit.training.data import make_loader
from aptvit.training.methods import build_model, set_drop_path
from aptvit.training.recipes.dense import DenseRecipe
from aptvit.training.sampler import Draw
from aptvit.training.speed import training_speedup
from aptvit.training.tasks.task import Task

__all__ = [
    "MapTeacher",
    "adaptive_backbone",
    "answers_in_eval",
    "check_start",
    "freeze_heads",
    "freeze_unread",
    "nothing_merged",
    "step_speedup",
    "window_pixels",
]


def adaptive_backbone(host: Host, recipe: DenseRecipe) -> AdaptivePatchTransformer:
    """The host with windows and without a classifier; with nothing merged for ``method=uniform``."""
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


def freeze_unread(model: AdaptivePatchTransformer, last_block: int) -> None:
    """Freeze parameters that the maps do not depend on: processes that train together wait for all gradients.

    Args:
        model: The backbone.
        last_block: The last block whose output is read.
    """
    vit = model.adapter.vit
    after = [getattr(vit, name, None) for name in ("norm", "fc_norm", "attn_pool", "head")]
    for module in (*after, *vit.blocks[last_block + 1 :]):
        if isinstance(module, nn.Module):
            module.requires_grad_(False)


def check_start(recipe: DenseRecipe, folder: Path | None) -> None:
    """Raises ValueError if the recipe needs an earlier training to start from, and there is none."""
    if recipe.from_maps and folder is None:
        raise ValueError("from_maps: a trained uniform network is the teacher of the maps; name it with --start")


def freeze_heads(network: Any) -> None:
    """Freeze the layers after the maps, which a loss of maps does not reach."""
    for name, parameter in network.named_parameters():
        if not name.startswith(("backbone.model.", "backbone.cell_detail.")):
            parameter.requires_grad_(False)


def answers_in_eval(network: nn.Module, model: AdaptivePatchTransformer, outputs: Answers) -> Answers:
    """Outputs of a network in evaluation, with nothing merged.

    Args:
        network: All of it.
        model: The adaptive model inside.
        outputs: (B, C, H, W) normalised images -> (B, K, H', W').
    """

    @torch.no_grad()
    def answers(images: Tensor) -> Tensor:
        with nothing_merged(model), as_in_evaluation(network, model):
            return outputs(images)

    return answers


class MapTeacher:
    """The maps of a copy of a network, with nothing merged.

    Args:
        backbone: Of the network; it is copied.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
        model = self.backbone.model
        model.thresholds = (-1.0,) * (model.num_scales - 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) normalised images -> (B, D, h, w) for each depth that is read"""
        maps: list[Tensor] = self.backbone.maps(images)
        return maps


@contextmanager
def nothing_merged(model: AdaptivePatchTransformer) -> Iterator[None]:
    """In this context the model merges nothing."""
    budget = model.budget
    model.budget = Budget((-1.0,) * (model.num_scales - 1))
    try:
        yield
    finally:
        model.budget = budget


def window_pixels(model: AdaptivePatchTransformer) -> int:
    """Side of a window in pixels, 1 without windows."""
    return 1 if model.window_size is None else model.patch_size * model.window_size


def step_speedup(task: Task, batch_size: int, accelerator: Any) -> Ratio:
    """Forward and backward of the whole network, with nothing merged and as it is set."""
    model = task.model
    size = min(batch_size, len(task.images))
    (batch,) = make_loader(task.images, [[Draw(i, 0) for i in range(size)]], 0)
    learner, chosen = task.learner(task.network), model.budget

    def loss(budget: Any) -> Tensor:
        model.budget = budget
        return task.losses(learner, batch, accelerator).each.mean()

    with nothing_merged(model):
        uniform = model.budget
        return training_speedup(lambda: loss(uniform), lambda: loss(chosen), (task.network,), accelerator)
