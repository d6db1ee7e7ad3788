"""A finished training, evaluated: how good and how fast its model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aptvit
from aptvit.hosts.pretrained import Host, load_host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.training.data import DeviceAugmentation, ImageDataset, make_loader
from aptvit.training.evaluation import score_model
from aptvit.training.methods import Shares, build_model
from aptvit.training.objectives import Learner
from aptvit.training.recipes.common import Recipe
from aptvit.training.recipes.dense import DenseRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.run_folder import read_origin, read_recipe, sources_of

__all__ = ["evaluate_run", "evaluate_run_on"]


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
    origin, recipe = read_origin(run), read_recipe(run)
    evaluation = sources_of(origin["data"], recipe)[1]
    if evaluation is None:
        raise ValueError(f"{run} set no images aside: train with --set hold_back=0.1, or give val/ beside train/")
    if isinstance(recipe, DenseRecipe):
        from aptvit.dense.saved import from_pretrained
        from aptvit.evaluation.dense import evaluate_dense

        rows = evaluate_dense(from_pretrained(run), evaluation, rounds=rounds, device=device)
        return [{"share": recipe.keep, **rows["adaptive"]}]
    checkpoint = None if origin["checkpoint"] is None else Path(origin["checkpoint"])
    host = load_host(origin["model"], checkpoint, origin["img_size"])
    uniform: Any = host.model.to(device).requires_grad_(False)
    distils = isinstance(recipe, DistillationRecipe)
    model: Any = _load_model(run, recipe, origin).to(device).eval().requires_grad_(False)
    augment = DeviceAugmentation(host.data, None, 0 if distils else model.num_classes, torch.device(device))
    pictures, shares = ImageDataset(evaluation, host.data), Shares(model, recipe)
    numbers = range(len(pictures))
    batches = [list(numbers[i : i + batch_size]) for i in range(0, len(pictures), batch_size)]
    accelerator = Accelerator(cpu=device == "cpu")
    results = []
    for share in shares.in_use if recipe.per_image else shares.in_use[:1]:
        if recipe.per_image:
            shares.set(share)
        teacher = Learner(uniform) if distils else None
        scores = score_model(Learner(model), model, make_loader(pictures, batches, 0), augment, teacher, accelerator)
        images = augment.normalised(next(iter(make_loader(pictures, batches, 0))))
        with torch.inference_mode():
            times = interleaved([partial(uniform, images), partial(model, images)], rounds, device, warmup=1)
        results.append({"share": share, **scores, **Ratio.of_rounds(*times).named("speedup")})
    return results


def evaluate_run_on(
    data: str, run: Path, task: str, shares: Sequence[float] = (), rounds: int = 5, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Run a detector or a segmenter over other data than it was trained on, and time it beside the uniform one.

    Args:
        data: As for `sources_of`: its validation images, or all if there are none apart.
        run: Folder of the training.
        task: "detection" or "segmentation".
        shares: Also the same network on smaller images with as many tokens, for each of these shares.
        rounds: Interleaved rounds of timing.
        device: Where to run.

    Returns:
        The row of the network, or, with shares, a row for each method.

    Raises:
        ValueError: If the training is of another task, or there are no images.
    """
    from aptvit.dense.saved import from_pretrained
    from aptvit.evaluation.dense import evaluate_dense

    dense = from_pretrained(run)
    if dense.task != task:
        raise ValueError(f"{run} does {dense.task}, not {task}")
    images, evaluation = sources_of(data, replace(read_recipe(run), hold_back=0.0))  # nothing is trained here
    files = evaluation or images
    rows = evaluate_dense(dense, files, shares or None, rounds, device)
    return [{"method": name, **row} for name, row in rows.items()] if shares else list(rows.values())


def _load_model(run: Path, recipe: Recipe, origin: dict[str, Any]) -> nn.Module:
    if recipe.method in ("apt", "resize"):
        return aptvit.from_pretrained(run / "model")
    host: Host = load_host(origin["model"], run / "model" / "model.safetensors", origin["img_size"])
    model: nn.Module = build_model(host.model, recipe)
    return model
