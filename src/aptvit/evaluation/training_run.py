"""Evaluations of finished trainings: metrics and speed of a classifier, a detector or a segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import aptvit
from aptvit.api import load_model
from aptvit.datasets.boxes import BoxFiles
from aptvit.datasets.masks import MaskFiles
from aptvit.datasets.sources import Part
from aptvit.dense.inference import resize_options, run_network
from aptvit.dense.saved import DenseModel, from_pretrained
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.pretrained import load_host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved, paired_rounds
from aptvit.patching.budget import Budget
from aptvit.training.data import DeviceAugmentation, ImageDataset, make_loader
from aptvit.training.evaluation import score_model
from aptvit.training.methods import Shares, build_model
from aptvit.training.objectives import Learner
from aptvit.training.processes import PRECISIONS, precision_on
from aptvit.training.recipes.common import Precision
from aptvit.training.recipes.dense import DenseRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.run_folder import read_origin, read_recipe, report_problems, sources_of
from aptvit.training.tasks.datasets import BoxDataset, MaskDataset
from aptvit.training.tasks.detection import DetectionLearner, score_detector
from aptvit.training.tasks.segmentation import SegmentationLearner, score_segmenter

__all__ = ["evaluate_dense", "evaluate_run", "evaluate_run_on"]

_TIMED_IMAGES = 4  # of a dense task


def evaluate_run(
    run: Path,
    batch_size: int = 8,
    rounds: int = 5,
    device: str = "cpu",
    max_images: int | None = None,
    report: Callable[[str], None] = lambda problem: None,
) -> list[dict[str, float]]:
    """Evaluate the model of a training on its validation images.

    Args:
        run: Folder of the training.
        batch_size: Images per batch.
        rounds: Interleaved rounds of timing.
        device: Device of the models.
        max_images: Use only this number of images, spread evenly; None for all.
        report: Called with each reason why an image or an object is left out.

    Returns:
        For each share of the training: ``share``, ``images``, the metrics of the task, and ``speedup``,
        ``speedup_least`` and ``speedup_most`` relative to the uniform model.

    Raises:
        ValueError: If the training is not finished, or has no validation images.
    """
    weights = run / "model" / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{run} holds no finished training: the same command with --resume continues it")
    origin, recipe = read_origin(run), read_recipe(run)
    _, evaluation = sources_of(origin["data"], recipe, origin.get("train_split"), origin.get("val_split"))
    if evaluation is None:
        raise ValueError(f"{run} has no validation images: train with --set hold_back=0.1, or give val/ beside train/")
    report_problems(evaluation.problems, report)
    evaluation = spread_evenly(evaluation, max_images)
    if isinstance(recipe, DenseRecipe):
        rows = evaluate_dense(from_pretrained(run), evaluation, rounds=rounds, device=device)
        return [{"share": recipe.keep, **rows["adaptive"]}]
    accelerator = _accelerator(device, recipe.precision)  # of the evaluations in the training
    checkpoint = None if origin["checkpoint"] is None else Path(origin["checkpoint"])
    host = load_model(origin["model"], checkpoint, origin["img_size"])
    uniform: Any = host.model.to(device).requires_grad_(False)
    distils = isinstance(recipe, DistillationRecipe)
    if recipe.method in ("apt", "resize"):
        model: Any = aptvit.from_pretrained(run / "model")
    else:
        model = build_model(load_host(origin["model"], weights, origin["img_size"]).model, recipe)
    model.to(device).eval().requires_grad_(False)
    augment = DeviceAugmentation(host.data, None, 0 if distils else model.num_classes, torch.device(device))
    dataset, shares = ImageDataset(evaluation, host.data, labelled=not distils), Shares(model, recipe)
    batches = torch.arange(len(dataset)).split(batch_size)
    loader = partial(make_loader, dataset, [batch.tolist() for batch in batches], 0)
    teacher = (lambda batch, images: uniform(images)) if distils else None
    results = []
    for share in shares.in_use if recipe.per_image else shares.in_use[:1]:
        if recipe.per_image:
            shares.set(share)
        scores = score_model(Learner(model), model, loader(), augment, teacher, accelerator)
        images = augment.normalised(next(iter(loader())))
        with torch.inference_mode():
            times = interleaved([partial(uniform, images), partial(model, images)], rounds, device, warmup=1)
        results.append(
            {"share": share, "images": len(evaluation), **scores, **Ratio.of_rounds(*times).named("speedup")}
        )
    return results


def evaluate_run_on(
    data: str,
    run: Path,
    task: str,
    shares: Sequence[float] = (),
    rounds: int = 5,
    device: str = "cpu",
    max_images: int | None = None,
    split: str | None = None,
    report: Callable[[str], None] = lambda problem: None,
) -> list[dict[str, Any]]:
    """Evaluate a trained detector or segmenter on other data.

    Args:
        data: As for `sources_of`: its validation images, or all images if it has no split.
        run: Folder of the training.
        task: "detection" or "segmentation".
        shares: As for `evaluate_dense`.
        rounds: Interleaved rounds of timing.
        device: Device of the network.
        max_images: Use only this number of images, spread evenly; None for all.
        split: File, list or folder of the images to evaluate on, by itself or inside ``data``.
        report: Called with each reason why an image or an object is left out.

    Returns:
        The row of the network; with shares, a row for each method, named ``method``.

    Raises:
        ValueError: If the training is of another task, or there are no images.
    """
    dense = from_pretrained(run)
    if dense.task != task:
        raise ValueError(f"{run} does {dense.task}, not {task}")
    recipe = replace(read_recipe(run), hold_back=0.0)  # all images, or one split
    images, evaluation = sources_of(data, recipe, split)
    files = evaluation or images
    report_problems(files.problems, report)
    rows = evaluate_dense(dense, spread_evenly(files, max_images), shares, rounds, device)
    return [{"method": name, **row} for name, row in rows.items()] if shares else list(rows.values())


def evaluate_dense(
    dense: DenseModel, files: BoxFiles | MaskFiles, shares: Sequence[float] = (), rounds: int = 5, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Evaluate a detector or a segmenter: average precision or mean intersection over union, tokens, and time.

    Args:
        dense: The detector or segmenter.
        files: Images with boxes for a detector, with masks for a segmenter.
        shares: If given, evaluate two baselines too: the network with nothing merged, on the images, and on smaller
            images with each of these shares of the pixels.
        rounds: Interleaved rounds of timing, from pixels to boxes or classes.
        device: Device of the network.

    Returns:
        By name, "adaptive", and with shares "uniform" and "downscale@SHARE": ``images``; the results of
        `score_detector` or `score_segmenter`, with tokens relative to those of the uniform network;
        ``images_per_second``; and ``speedup``, ``speedup_least``, ``speedup_most`` relative to the uniform network.

    Raises:
        ValueError: If the model and the images are of different tasks or classes, or a share is not between 0 and 1.
    """
    if (dense.task == "detection") != isinstance(files, BoxFiles):
        raise ValueError(f"the model does {dense.task}: give images with boxes for detection, masks for segmentation")
    if isinstance(files, BoxFiles) and tuple(files.classes) != dense.classes:
        files = files.with_classes(dense.classes)
    if isinstance(files, MaskFiles) and files.names and tuple(files.names) != tuple(dense.classes):
        raise ValueError(f"the model has {', '.join(dense.classes)}, the masks {', '.join(files.names)}: give the same")
    if isinstance(files, MaskFiles) and files.num_classes > len(dense.classes):
        raise ValueError(f"the masks name {files.num_classes} classes, the model has {len(dense.classes)}")
    accelerator = _accelerator(device)
    dense.network.to(device)
    sides = {"uniform": (_uniform(dense, 1.0), 1.0)}
    for share in shares:
        if not 0 < share < 1:
            raise ValueError(f"smaller images have a share of the pixels between 0 and 1, not {share:g}")
        sides[f"downscale@{share:g}"] = (_uniform(dense, share), share)
    sides["adaptive"] = (dense, 1.0)
    images = [files.load(i)[0] for i in range(0, len(files), max(1, len(files) // _TIMED_IMAGES))][:_TIMED_IMAGES]
    with torch.inference_mode():
        runs = [partial(run_network, side) for side, _ in sides.values()]
        seconds = dict(zip(sides, paired_rounds(runs, images, rounds, device, warmup=1), strict=True))
    rows: dict[str, dict[str, float]] = {}
    for name in sides if shares else ["adaptive"]:
        side, share = sides[name]
        scores = _scores(side, files, accelerator)
        tokens = {label: share * scores[label] for label in scores if label in ("kept", "kept_content", "read")}
        speedup = Ratio.of_rounds(seconds["uniform"], seconds[name]).named("speedup")
        speed = {"images_per_second": len(images) / min(seconds[name]), **speedup}
        rows[name] = {"images": len(files), **scores, **tokens, **speed}
    return rows


def _uniform(dense: DenseModel, share: float) -> DenseModel:
    """The network with nothing merged, on images with a share of the pixels; it shares the parameters."""
    network: Any = share_parameters(dense.network)
    model, shrink = network.backbone.model, share**0.5
    model.budget = Budget((-1.0,) * (model.num_scales - 1))
    if dense.task == "detection":  # a detector resizes by itself
        transform = network.transform
        transform.min_size = tuple(round(side * shrink) for side in transform.min_size)
        transform.max_size = round(transform.max_size * shrink)
    return replace(dense, network=network, inference={**dense.inference, "shrink": shrink})


def _scores(dense: DenseModel, files: BoxFiles | MaskFiles, accelerator: Any) -> dict[str, float]:
    network, batches = dense.network, [[i] for i in range(len(files))]
    if isinstance(files, BoxFiles):
        loader = make_loader(BoxDataset(files, masks=network.roi_heads.has_mask()), batches, 0)
        return score_detector(DetectionLearner(network).eval(), network, loader, accelerator)
    loader = make_loader(MaskDataset(files, None, *resize_options(dense)), batches, 0)
    return score_segmenter(SegmentationLearner(network).eval(), network, loader, accelerator, dense.inference)


def spread_evenly(images: Any, count: int | None) -> Any:
    """At most ``count`` images of a source, or of files with boxes or masks, evenly spaced; None for all."""
    if count is None or count >= len(images):
        return images
    indices = [i * len(images) // count for i in range(count)]
    return images.only(indices) if hasattr(images, "only") else Part(images, indices)


def _accelerator(device: str, precision: Precision = "float32") -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if device == "cpu":
        keep_freed_memory()
    AcceleratorState._reset_state()  # an earlier evaluation may have had another precision
    return Accelerator(cpu=device == "cpu", mixed_precision=PRECISIONS[precision_on(device, precision)])
