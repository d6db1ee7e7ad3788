"""A detector or segmenter on images with known boxes or masks: how good and how fast it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from aptvit.dense.inference import resize_options, run_network
from aptvit.dense.saved import DenseModel
from aptvit.files.annotations import BoxFiles, MaskFiles
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.training.data import make_loader
from aptvit.training.tasks.datasets import BoxDataset, MaskDataset
from aptvit.training.tasks.dense import merging_disabled
from aptvit.training.tasks.detection import DetectionLearner, score_detector
from aptvit.training.tasks.segmentation import SegmentationLearner, score_segmenter

__all__ = ["evaluate_dense"]

_NEEDED = {"detection": "boxes", "segmentation": "masks"}


def evaluate_dense(
    dense: DenseModel,
    files: BoxFiles | MaskFiles,
    shares: Sequence[float] | None = None,
    rounds: int = 5,
    device: str = "cpu",
    timed: int = 4,
) -> dict[str, dict[str, float]]:
    """Average precision, or mean intersection over union; tokens; and time from pixels to boxes or classes.

    Args:
        dense: The model.
        files: Images with boxes for a detector, with masks for a segmenter.
        shares: Evaluate the baselines too: the network with nothing merged, on whole images and on images with these
            shares of the pixels. None for the model alone.
        rounds: Interleaved rounds of timing of all of them; 0 for none.
        device: Where to run.
        timed: Images that are timed.

    Returns:
        By name, "adaptive", and with shares "uniform" and "downscale@SHARE": ``images``; the results of
        `score_detector` or `score_segmenter`, tokens relative to those of whole images; ``images_per_second``, and
        ``speedup``, ``speedup_least``, ``speedup_most`` beside the network with nothing merged.

    Raises:
        ValueError: If model and images are of two tasks, there are other classes than the model has, or a share is not
            between 0 and 1.
    """
    _prepare(dense, files, device)
    sides = {"uniform": _Side(dense, merges=False)}
    for share in shares or ():
        if not 0 < share < 1:
            raise ValueError(f"smaller images have a share of the pixels between 0 and 1, not {share:g}")
        smaller = replace(dense, inference={**dense.inference, "shrink": share**0.5})
        sides[f"downscale@{share:g}"] = _Side(smaller, merges=False, share=share)
    sides["adaptive"] = _Side(dense)
    names = ["adaptive"] if shares is None else list(sides)
    scores = {name: sides[name].scores(files, device) for name in names}
    speeds = _speeds(sides, files, rounds, device, timed)
    return {name: scores[name] | speeds[name] for name in names}


def _prepare(dense: DenseModel, files: BoxFiles | MaskFiles, device: str) -> None:
    if (dense.task == "detection") != isinstance(files, BoxFiles):
        raise ValueError(f"the model does {dense.task}: give images with {_NEEDED[dense.task]}")
    if isinstance(files, BoxFiles) and tuple(files.classes) != dense.classes:
        raise ValueError(f"the model has {', '.join(dense.classes)}, the images hold {', '.join(files.classes)}")
    if isinstance(files, MaskFiles) and files.num_classes > len(dense.classes):
        raise ValueError(f"the masks name {files.num_classes} classes, the model has {len(dense.classes)}")
    if device == "cpu":
        keep_freed_memory()
    dense.network.to(device)


@dataclass(frozen=True)
class _Side:
    """A way to run the network: on images of a share of the pixels, merging or not."""

    dense: DenseModel
    merges: bool = True
    share: float = 1.0

    def scores(self, files: BoxFiles | MaskFiles, device: str) -> dict[str, float]:
        """Scores over all files; tokens relative to whole images."""
        from accelerate import Accelerator

        accelerator, network = Accelerator(cpu=device == "cpu"), self.dense.network
        batches = [[i] for i in range(len(files))]
        with self._set():
            if isinstance(files, BoxFiles):
                loader = make_loader(BoxDataset(files, masks=network.roi_heads.has_mask()), batches, 0)
                found = score_detector(DetectionLearner(network).eval(), network, loader, accelerator)
            else:
                loader = make_loader(MaskDataset(files, None, *resize_options(self.dense)), batches, 0)
                learner = SegmentationLearner(network).eval()
                found = score_segmenter(learner, network, loader, accelerator, self.dense.inference)
        tokens = {name: found[name] * self.share for name in found if name in ("kept", "kept_content", "read")}
        return {"images": len(files), **found, **tokens}

    def run(self, images: Sequence[Any]) -> None:
        with self._set():
            for image in images:
                run_network(self.dense, image)

    @contextmanager
    def _set(self) -> Iterator[None]:
        """Inside, the network runs so; a detector resizes by itself, to this size."""
        with nullcontext() if self.merges else merging_disabled(self.dense.model):
            if self.dense.task != "detection":
                yield
                return
            transform, shrink = self.dense.network.transform, self.dense.inference.get("shrink", 1.0)
            before = transform.min_size, transform.max_size
            transform.min_size = tuple(round(side * shrink) for side in transform.min_size)
            transform.max_size = round(transform.max_size * shrink)
            try:
                yield
            finally:
                transform.min_size, transform.max_size = before


@torch.inference_mode()
def _speeds(
    sides: Mapping[str, _Side], files: BoxFiles | MaskFiles, rounds: int, device: str, timed: int
) -> dict[str, dict[str, float]]:
    """Speed of each side beside the first, on images that are spread evenly."""
    if not rounds:
        return {name: {} for name in sides}
    images = [files.load(i)[0] for i in range(0, len(files), max(1, len(files) // timed))][:timed]
    times = interleaved([partial(side.run, images) for side in sides.values()], rounds, device, warmup=1)
    return {
        name: {"images_per_second": len(images) / min(taken), **Ratio.of_rounds(times[0], taken).named("speedup")}
        for name, taken in zip(sides, times, strict=True)
    }
