"""The classifier at the start of a training: the checkpoint's, if it has the classes of the images, or a new one."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal

import torch
from torch import nn

from aptvit.hosts.pretrained import class_names, imagenet_wnids, set_class_names
from aptvit.training.optimization import classifier_parameters
from aptvit.training.recipes.common import Recipe

__all__ = ["Head", "check_new_head", "describe_head", "fit_head"]

_LEAST_RATE = 5e-5  # of a new classifier; fine-tuning rates of 1e-6 to 4e-5 leave it at chance
_LEAST_PATH = 1e-3  # learning rate times updates: what Adam moves a weight by at most; logits reach about 1

Head = Literal["kept", "reordered", "unnamed", "new"]


def fit_head(vit: Any, classes: Sequence[str]) -> Head:
    """Give a model a classifier for classes in their order.

    Args:
        vit: A timm model; its classifier and the names of its classes are changed.
        classes: Names of the classes.

    Returns:
        "kept" if the classifier is for these classes in this order; "reordered" if it was for another order, and its
        rows were permuted; "unnamed" if it has as many classes, but no names to compare; "new" otherwise: it predicts
        all classes alike.
    """
    head: Head = "new"
    if vit.num_classes == len(classes):
        places = _places(vit, classes)
        if places is None:
            head = "unnamed"
        elif None not in places and len(set(places)) == len(places):
            head = "kept" if places == list(range(len(places))) else "reordered"
            _permute(vit, [place for place in places if place is not None])
    if head == "new":
        vit.reset_classifier(len(classes))
        for parameter in classifier_parameters(vit):
            nn.init.zeros_(
                parameter
            )  # random logits of pooled features are large, and take most of an epoch to unlearn
    set_class_names(vit, classes)
    return head


def describe_head(head: Head, classes: Sequence[str]) -> str:
    """A line about the classifier that `fit_head` returned; empty if nothing is to be noted."""
    return {
        "kept": "",
        "reordered": "the checkpoint has these classes in another order: the rows of its classifier were permuted",
        "unnamed": f"the checkpoint has {len(classes)} classes without names: taken as those of the images, in order",
        "new": f"the classifier is new, for {len(classes)} classes that the checkpoint does not have",
    }[head]


def check_new_head(recipe: Recipe, num_updates: int, classes: int) -> None:
    """Check that a recipe trains a new classifier far enough from its random start.

    Args:
        recipe: The recipe.
        num_updates: Number of updates.
        classes: Number of classes, for the message.

    Raises:
        ValueError: If its learning rate is too low, or there are too few updates.
    """
    rate = recipe.peak_lr * recipe.new_lr
    reason = f"the checkpoint does not have the {classes} classes of the images, and a new classifier"
    if rate < _LEAST_RATE:
        raise ValueError(f"{reason} does not learn at a rate of {rate:.2g}: use --recipe new-head")
    if rate * num_updates < _LEAST_PATH:
        factor = ceil(_LEAST_PATH / (rate * max(num_updates, 1)))
        epochs = max(recipe.epochs, 1) * factor
        raise ValueError(f"{reason} does not learn in {num_updates} updates: use --epochs {epochs} or more")


def _places(vit: Any, classes: Sequence[str]) -> list[int | None] | None:
    """The place of each class among those of the model, or None for a class it does not have; None without names."""
    if {*classes} == {str(number) for number in range(len(classes))}:
        return [int(name) for name in classes]
    names, places = class_names(vit), None
    for table in [] if names is None else [names, imagenet_wnids(names) or []]:
        numbers = {_plain(name): number for number, name in enumerate(table)}
        places = [numbers.get(_plain(name)) for name in classes]
        if None not in places:
            return places
    return places


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


@torch.no_grad()
def _permute(vit: Any, places: Sequence[int]) -> None:
    for parameter in classifier_parameters(vit):
        parameter.copy_(parameter[list(places)])
