"""Optimizer and schedule from timm: parameter groups with layer decay, and a learning rate for each update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from aptvit.models.checkpoints import is_new
from aptvit.training.recipes.common import Recipe

__all__ = ["choose_trained", "classifier_parameters", "make_optimizer", "make_schedule", "parameter_groups"]


def choose_trained(network: Any, model: Any, recipe: Recipe, new_head: bool) -> None:
    """Freeze the parameters that the recipe does not train.

    Args:
        network: The whole network.
        model: The pretrained model in the network, or the network itself.
        recipe: Setting ``trains``.
        new_head: Whether the classifier of the model is new.

    Raises:
        ValueError: If no parameter is left to train.
    """
    if recipe.trains == "all" or recipe.epochs == 0:
        return
    head = {id(p) for p in classifier_parameters(model)} if new_head else set()
    inside = {id(parameter) for parameter in model.parameters()}
    for name, parameter in network.named_parameters():
        is_head = recipe.trains == "heads" and id(parameter) not in inside
        parameter.requires_grad_(is_head or is_new(name) or id(parameter) in head)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(
            f"trains={recipe.trains} has nothing to train in epochs={recipe.epochs}, as resize_only, or a method other "
            "than apt, adds no parameters: set epochs=0 to choose patches only, resize_only=false, or trains=all"
        )


def classifier_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of the classifier of a model; distilled models have two classifiers."""
    classifier = model.get_classifier()
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [parameter for part in parts for parameter in part.parameters()]


def parameter_groups(network: Any, model: Any, recipe: Recipe, new_head: bool = False) -> list[dict[str, Any]]:
    """Group parameters by weight decay and by the scale of the learning rate.

    The classifier, or all parameters outside the model, have scale 1; each layer below has ``layer_decay`` times the
    scale of the layer above; new parameters, and a new classifier, have scale ``new_lr``. The schedule applies the
    scales in each update.

    Args:
        network: The whole network.
        model: The pretrained model in the network, or the network itself, with timm's ``group_matcher`` and
            ``no_weight_decay``.
        recipe: Settings ``weight_decay``, ``layer_decay`` and ``new_lr``.
        new_head: Whether the classifier of the model is new.

    Returns:
        Groups for a torch optimizer, with ``params``, ``weight_decay`` and ``lr_scale``.
    """
    excluded = set(model.no_weight_decay())
    if recipe.layer_decay < 1:
        groups = param_groups_layer_decay(model, recipe.weight_decay, excluded, layer_decay=recipe.layer_decay)
    else:
        groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=excluded)
    inside = {id(parameter) for parameter in model.parameters()}
    outside = [p for p in network.parameters() if p.requires_grad and id(p) not in inside]
    for matrices, decay in ((True, recipe.weight_decay), (False, 0.0)):
        groups.append({"params": [p for p in outside if (p.ndim > 1) == matrices], "weight_decay": decay})
    new = {id(parameter) for name, parameter in network.named_parameters() if is_new(name)}
    new |= {id(p) for p in classifier_parameters(model)} if new_head else set()
    split = []
    for group in groups:
        for is_new_group, scale in ((False, group.get("lr_scale", 1.0)), (True, recipe.new_lr)):
            parameters = [p for p in group["params"] if (id(p) in new) == is_new_group]
            if parameters:
                split.append({"params": parameters, "weight_decay": group["weight_decay"], "lr_scale": scale})
    return split


def make_optimizer(groups: Sequence[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Create the timm optimizer that the recipe names.

    Args:
        groups: Parameter groups, see `parameter_groups`.
        recipe: Name of the optimizer, learning rate and betas.

    Raises:
        ValueError: If timm has no optimizer of this name.
    """
    options: dict[str, Any] = {"betas": tuple(recipe.betas)} if "adam" in recipe.optimizer else {}
    try:
        return create_optimizer_v2(list(groups), recipe.optimizer, lr=recipe.peak_lr, weight_decay=0.0, **options)
    except (AssertionError, KeyError, ValueError):
        raise ValueError(f"timm has no optimizer {recipe.optimizer!r}: use adamw, sgd, lamb, lion, ...") from None


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, num_updates: int) -> Any:
    """Create timm's schedule: linear warm-up, then half a cosine; ``step_update(n)`` sets the rates of update n.

    Args:
        optimizer: Optimizer whose learning rates are set.
        recipe: Settings ``warmup``, ``min_lr`` and ``peak_lr``.
        num_updates: Total number of updates.
    """
    num_updates = max(num_updates, 1)
    warmup = min(round(recipe.warmup * num_updates), num_updates - 1)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=num_updates - warmup,
        updates_per_epoch=1,
        step_on_epochs=False,
        warmup_epochs=warmup,
        warmup_lr=recipe.peak_lr / (warmup + 1),  # from zero the first update would change nothing
        warmup_prefix=True,
        min_lr=recipe.min_lr * recipe.peak_lr,
    )
    return schedule
