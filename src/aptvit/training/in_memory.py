"""Heal or fine-tune a model in memory: the model stays as it is, and a trained copy is returned."""

from __future__ import annotations

import copy
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aptvit.api import host_of, load_saved
from aptvit.datasets.sources import Source, hold_back
from aptvit.hosts import get_adapter
from aptvit.hosts.pretrained import Host, data_config
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.training.recipe import load_recipe
from aptvit.training.recipes.common import Recipe
from aptvit.training.run_folder import sources_of
from aptvit.training.trainer import Training

__all__ = ["Trained", "finetune", "heal"]


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: The adaptive model in eval mode, on the device of the model that was given.
        results: Results of `aptvit.training.Training.run`; ``results["evaluations"]`` has the metrics before and after.
    """

    model: AdaptivePatchTransformer
    results: dict[str, Any]


def heal(
    model: nn.Module,
    images: str | Path | list[str] | Source,
    *,
    minutes: float = 8.0,
    evaluation: Source | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Trained:
    """Train an adaptive model to predict as its uniform model does, on images without labels: `aptvit heal` in memory.

    Args:
        model: An adaptive model, which keeps its scorer and patch sizes; or a timm model, which becomes adaptive by the
            recipe. It needs trained weights and classes, and is not changed.
        images: A folder, a list of files and folders, or a source, see `aptvit.datasets.sources`.
        minutes: Minutes of training.
        evaluation: Images to evaluate on; by default every tenth image is held back.
        out: Folder for log, checkpoints and model; by default a temporary folder, which is removed.
        settings: Further settings of the recipe ``heal``, such as ``keep=0.5``.

    Returns:
        The trained model, and the agreement with the uniform model before and after.

    Raises:
        ValueError: If model, images and settings do not fit together.
        ImportError: If a package that the training needs is not installed.
        KeyboardInterrupt: If the training was stopped.
    """
    data = [str(images)] if isinstance(images, (str, Path)) else images
    return _train(load_recipe("heal", {"max_minutes": minutes, **settings}), model, data, evaluation, out)


def finetune(
    model: nn.Module,
    data: str | Path | Source,
    *,
    recipe: str | Path = "short",
    evaluation: Source | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Trained:
    """Train an adaptive model on labelled images: `aptvit finetune` in memory.

    Args:
        model: An adaptive model, which keeps its scorer and patch sizes; or a timm model, which becomes adaptive by the
            recipe. It is not changed. If the images have other classes, the trained model has a classifier for them.
        data: A folder with a folder for each class, or another source of `aptvit.training.find_sources`.
        recipe: Name of a recipe or a YAML file: ``"new-head"`` for classes that the model does not have.
        evaluation: Images to evaluate on; by default those of the data, or every tenth image.
        out: Folder for log, checkpoints and model; by default a temporary folder, which is removed.
        settings: Settings of the recipe to replace, such as ``keep=0.5``, ``epochs=3``.

    Returns:
        The trained model, and its accuracy before and after.

    Raises:
        ValueError: If model, images and recipe do not fit together.
        ImportError: If a package that the training needs is not installed.
        KeyboardInterrupt: If the training was stopped.
    """
    data = str(data) if isinstance(data, Path) else data
    return _train(load_recipe(recipe, settings), model, data, evaluation, out)


def _train(recipe: Recipe, model: nn.Module, data: Any, evaluation: Source | None, out: str | Path | None) -> Trained:
    if recipe.method not in ("apt", "resize"):
        raise ValueError(f"method={recipe.method} gives no adaptive model: use aptvit.training.Training")
    recipe = recipe if evaluation is None else replace(recipe, hold_back=0.0)
    images, own_evaluation = sources_of(data, recipe) if isinstance(data, (str, list)) else (data, None)
    evaluation = own_evaluation if evaluation is None else evaluation
    if evaluation is None:
        images, evaluation = hold_back(images, recipe.hold_back)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if out is None else out)
        training = Training(recipe, _host(model), images, evaluation, folder)
        stack.enter_context(training.processes.only_writers(folder))
        results = training.run()
        if not results["finished"]:
            raise KeyboardInterrupt(f"stopped after {results['updates']} updates")
        saved = load_saved(folder)
        assert saved is not None
        device: torch.device = next(model.parameters()).device
        return Trained(saved[0].to(device), results)


def _host(model: nn.Module) -> Host:
    """A copy of the model as the host of a training."""
    if isinstance(model, AdaptivePatchTransformer):
        return host_of(copy.deepcopy(model).cpu())
    get_adapter(model).host_config()  # a model without a name could not be saved at the end
    copied = copy.deepcopy(model).cpu().eval()
    return Host(copied, "trained", data_config(copied))
