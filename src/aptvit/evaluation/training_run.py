"""A finished training, evaluated: how good and how fast its model is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aptvit
from aptvit.files.sources import find_sources, hold_back, photos, split_indices
from aptvit.hosts.pretrained import Host, load_host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.training.data import DeviceAugmentation, Pictures, make_loader
from aptvit.training.evaluation import score_model
from aptvit.training.methods import Shares, build_model
from aptvit.training.objectives import Learner
from aptvit.training.recipe import Recipe, load_recipe

__all__ = ["evaluate_run", "is_run", "read_recipe", "sources_of", "write_origin"]

_ORIGIN, _RECIPE = "run.json", "recipe.yaml"


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training that `evaluate_run` can evaluate."""
    return (folder / _ORIGIN).is_file()


def write_origin(run: Path, recipe: Recipe, **origin: Any) -> None:
    """Note what a training was made from: ``data``, ``model``, ``checkpoint``, ``img_size``."""
    (run / _ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    (run / _RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")


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
    if recipe.objective in ("boxes", "pixels"):
        files, aside = _dense_files(data, recipe)
        if aside is None:
            kept, numbers = split_indices(len(files), recipe.hold_back)
            files, aside = files.only(kept), files.only(numbers) if numbers else None
        return files, aside
    images, evaluation = find_sources(data, labelled=recipe.objective == "labels")
    return (images, evaluation) if evaluation is not None else hold_back(images, recipe.hold_back)


def _dense_files(data: str, recipe: Recipe) -> tuple[Any, Any]:
    from aptvit.files.annotations import find_boxes, find_masks

    if recipe.objective == "boxes":
        return find_boxes(data)
    return find_masks(data, ignore=recipe.ignore, subtract=recipe.subtract)


def evaluate_run(run: Path, batch_size: int = 8, rounds: int = 5, device: str = "cpu") -> list[dict[str, float]]:
    """Run the model of a training over the images that were set aside, and time it beside the uniform one.

    Args:
        run: Folder of the training.
        batch_size: Images per batch.
        rounds: Interleaved rounds of timing.
        device: Where to run.

    Returns:
        For each share that was trained: ``share``, the metrics of `score_model`, and ``speedup``, ``speedup_least``,
        ``speedup_most``.

    Raises:
        ValueError: If the training is not finished, or no images were set aside.
    """
    from accelerate import Accelerator

    if not (run / "model" / "model.safetensors").is_file():
        raise ValueError(f"{run} holds no finished training: the same command with --resume goes on with it")
    if device == "cpu":
        keep_freed_memory()
    origin, recipe = json.loads((run / _ORIGIN).read_text()), load_recipe(run / _RECIPE)
    evaluation = sources_of(origin["data"], recipe)[1]
    if evaluation is None:
        raise ValueError(f"{run} set no images aside: train with --set hold_back=0.1, or give val/ beside train/")
    if recipe.objective in ("boxes", "pixels"):
        from aptvit.dense.saved import from_pretrained
        from aptvit.evaluation.dense import evaluate_dense

        rows = evaluate_dense(from_pretrained(run), evaluation, rounds=rounds, device=device)
        return [{"share": recipe.keep, **rows["adaptive"]}]
    checkpoint = None if origin["checkpoint"] is None else Path(origin["checkpoint"])
    host = load_host(origin["model"], checkpoint, origin["img_size"])
    uniform: Any = host.model.to(device).requires_grad_(False)
    distils = recipe.objective == "distill"
    model: Any = _load_model(run, recipe, origin).to(device).eval().requires_grad_(False)
    augment = DeviceAugmentation(host.data, Recipe(), 0 if distils else model.num_classes, torch.device(device))
    pictures, shares = Pictures(evaluation, host.data), Shares(model, recipe)
    numbers = range(len(pictures))
    batches = [list(numbers[i : i + batch_size]) for i in range(0, len(pictures), batch_size)]
    accelerator = Accelerator(cpu=device == "cpu")
    results = []
    for share in shares.of_method if recipe.per_image else shares.of_method[:1]:
        if recipe.per_image:
            shares.set(share)
        teacher = Learner(uniform) if distils else None
        scores = score_model(Learner(model), model, make_loader(pictures, batches, 0), augment, teacher, accelerator)
        images = augment.normalised(next(iter(make_loader(pictures, batches, 0))))
        with torch.inference_mode():
            times = interleaved([partial(uniform, images), partial(model, images)], rounds, device, warmup=1)
        results.append({"share": share, **scores, **Ratio.of_rounds(*times).named("speedup")})
    return results


def _load_model(run: Path, recipe: Recipe, origin: dict[str, Any]) -> nn.Module:
    if recipe.method in ("apt", "resize"):
        return aptvit.from_pretrained(run / "model")
    host: Host = load_host(origin["model"], run / "model" / "model.safetensors", origin["img_size"])
    model: nn.Module = build_model(host.model, recipe)
    return model
