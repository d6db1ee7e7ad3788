"""A detector or segmenter on pictures whose boxes or masks are known: how good and how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from aptvit.dense.photos import run_on, size_of_pictures
from aptvit.dense.saved import DenseModel
from aptvit.files.annotations import BoxFiles, MaskFiles
from aptvit.measuring.timing import Spread, interleaved, keep_freed_memory
from aptvit.training.data import make_loader
from aptvit.training.tasks.datasets import BoxDataset, MaskDataset
from aptvit.training.tasks.dense import nothing_merged
from aptvit.training.tasks.detection import DetectionLearner, score_detector
from aptvit.training.tasks.segmentation import SegmentationLearner, score_segmenter

__all__ = ["evaluate_beside_smaller", "evaluate_dense"]


def evaluate_dense(
    dense: DenseModel, files: BoxFiles | MaskFiles, rounds: int = 5, device: str = "cpu", timed: int = 4
) -> dict[str, float]:
    """Average precision, or mean intersection over union; tokens; and time from pixels to boxes or classes.

    Args:
        dense: The model.
        files: Pictures with boxes for a detector, with masks for a segmenter.
        rounds: Interleaved rounds of timing, beside the same network with nothing merged; 0 for none.
        device: Where to run.
        timed: Pictures that are timed.

    Returns:
        ``images``; what `score_detector` or `score_segmenter` found; ``images_per_second``, and ``speedup``,
        ``speedup_least``, ``speedup_most`` beside the network with nothing merged.

    Raises:
        ValueError: If model and pictures are of two tasks, or there are other classes than the model has.
    """
    _prepare(dense, files, device)
    found = _scores(dense, files, device)
    if not rounds:
        return found
    images = _spread_evenly(files, timed)
    chosen = partial(_run_all, dense, images)
    uniform = partial(_with_nothing_merged, dense.model, chosen)
    return found | _times([uniform, chosen], len(images), rounds, device)[1]


def evaluate_beside_smaller(
    dense: DenseModel,
    files: BoxFiles | MaskFiles,
    shares: Sequence[float],
    rounds: int = 5,
    device: str = "cpu",
    timed: int = 4,
) -> dict[str, dict[str, float]]:
    """`evaluate_dense` of a model and of what an adaptive one is to beat, all timed in the same rounds.

    Args:
        dense: The model.
        files: As for `evaluate_dense`; so are the others.
        shares: Of the pixels that smaller pictures have, which the model reads with nothing merged.

    Returns:
        By name, "uniform", "downscale@SHARE" and "adaptive". Tokens are shares of those of the uniform model.

    Raises:
        ValueError: As by `evaluate_dense`, and if a share is not between 0 and 1.
    """
    _prepare(dense, files, device)
    smaller = [(share, _smaller(dense, share)) for share in shares]
    images = _spread_evenly(files, timed)
    rows: dict[str, dict[str, float]] = {}
    runs: list[Callable[[], None]] = []
    with nothing_merged(dense.model):
        for share, its in ((1.0, dense), *smaller):
            with _at_its_size(its):
                found = _scores(its, files, device)
            name = "uniform" if its is dense else f"downscale@{share:g}"
            rows[name] = found | {
                kept: found[kept] * share for kept in ("kept", "kept_content", "read") if kept in found
            }
            runs.append(partial(_with_nothing_merged, dense.model, partial(_run_all, its, images)))
    rows["adaptive"] = _scores(dense, files, device)
    runs.append(partial(_run_all, dense, images))
    if rounds:
        for row, times in zip(rows.values(), _times(runs, len(images), rounds, device), strict=True):
            row |= times
    return rows


def _scores(dense: DenseModel, files: BoxFiles | MaskFiles, device: str) -> dict[str, float]:
    from accelerate import Accelerator

    accelerator, network = Accelerator(cpu=device == "cpu"), dense.network
    batches = [[i] for i in range(len(files))]
    if isinstance(files, BoxFiles):
        loader = make_loader(BoxDataset(files, masks=network.roi_heads.has_mask()), batches, 0)
        found = score_detector(DetectionLearner(network).eval(), network, loader, accelerator)
    else:
        loader = make_loader(MaskDataset(files, None, *size_of_pictures(dense)), batches, 0)
        found = score_segmenter(SegmentationLearner(network).eval(), network, loader, accelerator, dense.inference)
    return {"images": len(files), **found}


def _prepare(dense: DenseModel, files: BoxFiles | MaskFiles, device: str) -> None:
    if (dense.task == "detection") != isinstance(files, BoxFiles):
        raise ValueError(f"the model does {dense.task}: give pictures with {_NEEDED[dense.task]}")
    if isinstance(files, BoxFiles) and tuple(files.classes) != dense.classes:
        raise ValueError(f"the model knows {', '.join(dense.classes)}, the pictures hold {', '.join(files.classes)}")
    if isinstance(files, MaskFiles) and files.num_classes > len(dense.classes):
        raise ValueError(f"the masks name {files.num_classes} classes, the model knows {len(dense.classes)}")
    if device == "cpu":
        keep_freed_memory()
    dense.network.to(device)


_NEEDED = {"detection": "boxes", "segmentation": "masks"}


def _smaller(dense: DenseModel, share: float) -> DenseModel:
    """The same network for pictures with a share of the pixels."""
    if not 0 < share < 1:
        raise ValueError(f"smaller pictures have a share of the pixels between 0 and 1, not {share:g}")
    return replace(dense, inference={**dense.inference, "shrink": share**0.5})


@contextmanager
def _at_its_size(dense: DenseModel) -> Iterator[None]:
    """A detector resizes by itself."""
    if dense.task != "detection":
        yield
        return
    transform, shrink = dense.network.transform, dense.inference.get("shrink", 1.0)
    before = transform.min_size, transform.max_size
    transform.min_size = tuple(round(side * shrink) for side in transform.min_size)
    transform.max_size = round(transform.max_size * shrink)
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before


def _spread_evenly(files: BoxFiles | MaskFiles, number: int) -> list[Any]:
    return [files.load(i)[0] for i in range(0, len(files), max(1, len(files) // number))][:number]


def _run_all(dense: DenseModel, images: Sequence[Any]) -> None:
    with _at_its_size(dense):
        for image in images:
            run_on(dense, image)


def _with_nothing_merged(model: Any, run: Callable[[], None]) -> None:
    with nothing_merged(model):
        run()


def _times(runs: Sequence[Callable[[], None]], images: int, rounds: int, device: str) -> list[dict[str, float]]:
    """Of each, beside the first one."""
    with torch.inference_mode():
        interleaved(runs, 1, device)
        times = interleaved(runs, rounds, device)
    spreads = [Spread.of_ratios(times[0], its) for its in times]
    return [
        {
            "images_per_second": images / min(its),
            "speedup": spread.median,
            "speedup_least": spread.least,
            "speedup_most": spread.most,
        }
        for its, spread in zip(times, spreads, strict=True)
    ]
