"""A detector or segmenter on pictures whose boxes or masks are known: how good and how fast it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from aptvit.dense.detection import DetectionLearner, score_detector
from aptvit.dense.photos import run_on
from aptvit.dense.pictures import BoxPictures, MaskPictures
from aptvit.dense.saved import DenseModel
from aptvit.dense.segmentation import SegmentationLearner, score_segmenter
from aptvit.dense.sources import BoxFiles, MaskFiles
from aptvit.measure import Spread, interleaved
from aptvit.training.data import make_loader

__all__ = ["evaluate_dense"]


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
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    network: Any = dense.network.to(device)
    _check(dense, files)
    if isinstance(files, BoxFiles):
        loader = make_loader(
            BoxPictures(files, masks=dense.network.roi_heads.has_mask()), [[i] for i in range(len(files))], 0
        )
        found = score_detector(DetectionLearner(network).eval(), network, loader, accelerator)
    else:
        pictures = MaskPictures(files, longer_side=dense.inference["longer_side"])
        loader = make_loader(pictures, [[i] for i in range(len(files))], 0)
        found = score_segmenter(SegmentationLearner(network).eval(), network, loader, accelerator, dense.inference)
    return {"images": len(files), **found, **(_timed(dense, files, rounds, device, timed) if rounds else {})}


def _check(dense: DenseModel, files: BoxFiles | MaskFiles) -> None:
    if (dense.task == "detection") != isinstance(files, BoxFiles):
        raise ValueError(f"the model does {dense.task}: give pictures with {_NEEDED[dense.task]}")
    if isinstance(files, BoxFiles) and tuple(files.classes) != dense.classes:
        raise ValueError(f"the model knows {', '.join(dense.classes)}, the pictures hold {', '.join(files.classes)}")
    if isinstance(files, MaskFiles) and files.num_classes > len(dense.classes):
        raise ValueError(f"the masks name {files.num_classes} classes, the model knows {len(dense.classes)}")


_NEEDED = {"detection": "boxes", "segmentation": "masks"}


def _timed(dense: DenseModel, files: BoxFiles | MaskFiles, rounds: int, device: str, number: int) -> dict[str, float]:
    step = max(1, len(files) // number)
    images = [files.load(i)[0] for i in range(0, len(files), step)][:number]
    model, chosen = dense.model, dense.model.budget
    model.thresholds = (-1.0,) * (model.num_scales - 1)
    uniform = model.budget

    def run(budget: Any) -> None:
        model.budget = budget
        for image in images:
            run_on(dense, image)

    try:
        with torch.inference_mode():
            runs = [partial(run, uniform), partial(run, chosen)]
            interleaved(runs, 1, device)
            times = interleaved(runs, rounds, device)
    finally:
        model.budget = chosen
    spread = Spread.of_ratios(*times)
    return {
        "images_per_second": len(images) / min(times[1]),
        "speedup": spread.median,
        "speedup_least": spread.least,
        "speedup_most": spread.most,
    }
