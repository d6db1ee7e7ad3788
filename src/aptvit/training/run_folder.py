"""A training in its folder: what it was made from, its images, and how it is started or continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aptvit.files.sources import find_sources, hold_back, photos, split_indices
from aptvit.hosts.pretrained import load_host
from aptvit.training.recipe import load_recipe
from aptvit.training.recipes.common import Recipe
from aptvit.training.recipes.dense import DenseRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.trainer import Training

__all__ = ["is_run", "read_origin", "read_recipe", "sources_of", "train", "write_origin"]

_ORIGIN, _RECIPE = "run.json", "recipe.yaml"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training, and what it was made from."""
    return (folder / _ORIGIN).is_file()


def write_origin(run: Path, recipe: Recipe, **origin: Any) -> None:
    """Write what a training is made from: ``data``, ``model``, ``checkpoint``, ``img_size``."""
    (run / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    (run / _RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")


def read_origin(run: Path) -> dict[str, Any]:
    """What `write_origin` wrote."""
    origin: dict[str, Any] = json.loads((run / _ORIGIN).read_text(encoding="utf-8"))
    return origin


def read_recipe(run: Path) -> Recipe:
    """The recipe of a training.

    Raises:
        ValueError: If the folder holds none.
    """
    for file in (run / _RECIPE, run.parent / _RECIPE):  # also from model/ inside it
        if file.is_file():
            return load_recipe(file)
    raise ValueError(f"{run} is no folder of a training: it holds no {_RECIPE}")


def sources_of(data: str | list[str], recipe: Recipe) -> tuple[Any, Any]:
    """Images to train on and images to evaluate on, None if there are none; a list is photos without labels.

    Raises:
        ValueError: If there are no images, or no classes where there must be some.
    """
    if isinstance(data, list):
        return hold_back(photos(data), recipe.hold_back)
    if isinstance(recipe, DenseRecipe):
        files, aside = _dense_files(data, recipe)
        if aside is None:
            kept, numbers = split_indices(len(files), recipe.hold_back)
            files, aside = files.only(kept), files.only(numbers) if numbers else None
        return files, aside
    images, evaluation = find_sources(data, labelled=not isinstance(recipe, DistillationRecipe))
    return (images, evaluation) if evaluation is not None else hold_back(images, recipe.hold_back)


def _dense_files(data: str, recipe: Recipe) -> tuple[Any, Any]:
    from aptvit.files.annotations import find_boxes, find_masks

    if isinstance(recipe, SegmentationRecipe):
        return find_masks(data, ignore=recipe.ignore, subtract=recipe.subtract)
    return find_boxes(data)


def train(
    recipe: Recipe,
    data: str | list[str],
    model: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    start: Path | None = None,
    resume: bool = False,
    report: Callable[[str], None] = lambda problem: None,
) -> dict[str, Any]:
    """Run a training in a folder, or the remaining part of one.

    Args:
        recipe: Of the task.
        data: As for `sources_of`.
        model: timm's name of the model.
        out: Folder of the training.
        checkpoint: Weights of the model instead of timm's own.
        img_size: Side of its input in pixels.
        start: A trained detector or segmenter to take weights from.
        resume: Continue from the newest checkpoint in the folder.
        report: Is called with each reason why an image or a box is left out, before the training starts.

    Returns:
        What `Training.run` returns.

    Raises:
        ValueError: If recipe, model and images do not fit each other.
        ImportError: If what training needs is not installed.
    """
    images, evaluation = sources_of(data, recipe)
    for problem in getattr(images, "problems", ()):
        report(problem)
    training = Training(recipe, load_host(model, checkpoint, img_size), images, evaluation, out, start)
    if training.processes.is_first:
        file = None if checkpoint is None else str(checkpoint.resolve())
        if isinstance(data, str) and not data.startswith("hf:"):
            data = str(Path(data).resolve())
        write_origin(out, recipe, data=data, model=model, checkpoint=file, img_size=img_size)
    return training.run(resume)
