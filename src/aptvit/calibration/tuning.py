"""Thresholds, and optionally the image size, from a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from aptvit.api import adapt, adaptivity_of
from aptvit.calibration.calibrator import Calibration, Calibrator
from aptvit.calibration.costs import gflops_of_tokens
from aptvit.files.images import ImageError, open_image
from aptvit.hosts.pretrained import Host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.checkpoints import settings_of
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.storage.writing import write_json

__all__ = ["Candidate", "ImageStream", "TuningResult", "calibrate_files", "choose_resolution", "write_config"]


class ImageStream:
    """(B, C, H, W) uint8 batches of image files, read lazily through timm's evaluation transform, repeatedly.

    Files that cannot be read are skipped and reported.

    Args:
        paths: Image files.
        data: timm's data configuration of the model.
        size: Side of the images in pixels; the configuration's own by default.
        batch_size: Images per batch; the last batch may hold fewer.
        device: Device of the batches.
        progress: Wraps the files.
        transform: A model's own transform of an upright image to (C, H, W) uint8, instead of timm's.

    Attributes:
        skipped: Error messages of skipped files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        data: dict[str, Any],
        size: int | None = None,
        batch_size: int = 16,
        device: str = "cpu",
        progress: Progress = silent,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if size is not None:
            data = {**data, "input_size": (data["input_size"][0], size, size)}
        # uint8, not normalised
        self._transform: Any = transform or create_transform(**data, is_training=False, use_prefetcher=True)
        self.paths, self.batch_size, self.device, self.progress = paths, batch_size, device, progress
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Tensor]:
        self.skipped = []
        ready: list[Tensor] = []
        for path in self.progress(self.paths, "reading images", len(self.paths)):
            try:
                image = torch.as_tensor(self._transform(open_image(path)))
            except ImageError as error:
                self.skipped.append(str(error))
                continue
            if len(ready) == self.batch_size or (ready and image.shape != ready[0].shape):
                yield torch.stack(ready).to(self.device)
                ready = []
            ready.append(image)
        if ready:
            yield torch.stack(ready).to(self.device)
        if len(self.skipped) == len(self.paths):
            raise ValueError(f"none of {len(self.paths)} files can be read as an image; the first: {self.skipped[0]}")


@dataclass(frozen=True)
class Candidate:
    """One image size, calibrated to the common cost.

    Attributes:
        size: Side in pixels.
        calibration: Thresholds at this size.
        agreement: Share of the images with the uniform model's top class.
        divergence: Mean Kullback-Leibler divergence from the uniform model's classes, in nats. Candidates are ranked by
            it, since agreement is coarse on few images.
    """

    size: int
    calibration: Calibration
    agreement: float
    divergence: float


@dataclass(frozen=True)
class TuningResult:
    """Results of a calibration on image files.

    Attributes:
        model: The adaptive model with its thresholds set.
        calibration: Thresholds, target and result.
        size: Side of the images in pixels.
        skipped: Error messages of files that could not be read.
        candidates: All sizes of `choose_resolution`.
        speedup: Speed-up measured with these thresholds, for a target of speed.
    """

    model: Any
    calibration: Calibration
    size: int
    skipped: list[str]
    candidates: list[Candidate] = field(default_factory=list)
    speedup: Ratio | None = None

    def to_dict(self) -> dict[str, Any]:
        """All attributes but the model, for JSON."""
        record: dict[str, Any] = {**self.calibration.to_dict(), "size": self.size, "skipped": self.skipped}
        if self.candidates:
            record["candidates"] = [asdict(candidate) for candidate in self.candidates]
        if self.speedup is not None:
            record["measured_speedup"] = asdict(self.speedup)
        return record


def calibrate_files(
    host: Host,
    paths: Sequence[Path],
    target: dict[str, float],
    options: dict[str, Any],
    *,
    hold_back: int = 5,
    device: str = "cpu",
    progress: Progress = silent,
) -> TuningResult:
    """Find thresholds for a target in one pass over image files, in bounded memory.

    Args:
        host: The uniform model; with ``adaptive`` its saved adaptive model is calibrated, which keeps its scorer.
        paths: Image files.
        target: ``{"keep": …}``, ``{"gflops": …}`` or ``{"speedup": …}``.
        options: For `aptvit.adapt`: scorer (``"glance"`` is trained on these images first), scales, limits.
        hold_back: Hold back every n-th image to validate thresholds of the other images; 0 for none.
        device: Device to run on.
        progress: Wraps long loops.

    Raises:
        ValueError: If no image can be read, or the target cannot be met.
    """
    if device == "cpu":
        keep_freed_memory()
    images = ImageStream(paths, host.data, device=device, progress=progress, transform=host.read)
    if host.adaptive is not None:
        model = host.adaptive.to(device).requires_grad_(False)
    else:
        model = adapt(host.model.to(device).requires_grad_(False), **options)
        _fit_scorer(model, images)
    settings = adaptivity_of(model)
    calibrator, first = None, None
    for batch in images:
        if calibrator is None:
            calibrator, first = Calibrator.of_target(settings, target, batch[:8], hold_back=hold_back), batch
        calibrator.add(settings.patchifier.normalization.normalised(batch))
    assert calibrator is not None and first is not None
    calibration = calibrator.solve()
    measured = _measured_speedup(model, first) if "speedup" in target else None
    return TuningResult(model, calibration, host.data["input_size"][-1], images.skipped, speedup=measured)


def _fit_scorer(model: Any, images: ImageStream) -> None:
    """Train a scorer that needs it."""
    if isinstance(adaptivity_of(model).patchifier.scorer, GlanceScorer):
        fit_glance(model, images)


@torch.inference_mode()
def _measured_speedup(model: AdaptivePatchTransformer, images: Tensor, rounds: int = 5) -> Ratio:
    runs = [partial(model, images, keep=1.0), partial(model, images)]
    interleaved(runs, 1, images.device)
    return Ratio.of_rounds(*interleaved(runs, rounds, images.device))


def choose_resolution(
    host: Host,
    paths: Sequence[Path],
    target: dict[str, float],
    options: dict[str, Any],
    *,
    sizes: Sequence[int] | None = None,
    max_images: int = 256,
    device: str = "cpu",
    progress: Progress = silent,
) -> TuningResult:
    """Choose image size and thresholds together: at equal operations, the outputs nearest to the uniform model's.

    No labels are needed. Larger images with more merging and smaller images with less can cost the same; which is
    better depends on model and images.

    Args:
        host: The uniform model, whose outputs at its own size are the reference.
        paths: Image files; thresholds are found on all of them.
        target: ``{"keep": …}`` of the tokens at the model's own size, or ``{"gflops": …}``.
        options: For `aptvit.adapt`.
        sizes: Sides in pixels to try; from 0.8 to 1.5 times the model's own by default.
        max_images: Most images to compare outputs on.
        device: Device to run on.
        progress: Wraps long loops.

    Raises:
        ValueError: If no size can meet the target, or the model has no classes to compare.
    """
    if host.model.num_classes == 0 or host.weights == "random":
        raise ValueError("resolution auto compares classes: it needs a model with classes and trained weights")
    if "speedup" in target:
        raise ValueError(f"resolution auto compares at equal operations: give keep or gflops, not {target}")
    model = AdaptivePatchTransformer(host.model.to(device).requires_grad_(False), **options)
    host_size = host.data["input_size"][-1]
    gflops = target.get("gflops") or _gflops_of_share(model, target["keep"], host_size)
    compared = paths[:max_images]
    _fit_scorer(model, ImageStream(paths, host.data, device=device, progress=progress))
    uniform_logits = _logits(host.model, model, ImageStream(compared, host.data, device=device), progress)
    candidates, refused, skipped = [], [], []
    sizes = sizes or _sizes_around(host_size, model.patch_size)
    for size in progress(sizes, "trying sizes", len(sizes)):
        images = ImageStream(paths, host.data, size, device=device)
        try:
            calibrator = None
            for batch in images:
                calibrator = calibrator or Calibrator.of_target(model, {"gflops": gflops}, batch, hold_back=5)
                calibrator.add(batch)
            assert calibrator is not None
            calibration = calibrator.solve()
        except ValueError as error:
            refused.append(f"{size} px: {error}")
            continue
        skipped = images.skipped
        logits = _logits(model, model, ImageStream(compared, host.data, size, device=device), silent)
        agreement = float((logits.argmax(1) == uniform_logits.argmax(1)).float().mean())
        divergence = F.kl_div(
            logits.log_softmax(1), uniform_logits.log_softmax(1), log_target=True, reduction="batchmean"
        )
        candidates.append(Candidate(size, calibration, agreement, float(divergence)))
    if not candidates:
        raise ValueError(f"no size can meet gflops={gflops:.3g}; {refused[0]}")
    best = min(candidates, key=lambda candidate: candidate.divergence)
    model.thresholds = best.calibration.thresholds
    model.patchifier.calibration = {**best.calibration.to_dict(), "size": best.size}
    return TuningResult(model, best.calibration, best.size, skipped, candidates)


@torch.inference_mode()
def _logits(
    run: Callable[[Tensor], Tensor], model: AdaptivePatchTransformer, images: ImageStream, progress: Progress
) -> Tensor:
    batches = progress(images, "running the model", -(-len(images.paths) // images.batch_size))
    return torch.cat([run(model.patchifier.normalization.normalised(batch)).float().cpu() for batch in batches])


def _gflops_of_share(model: AdaptivePatchTransformer, keep: float, size: int) -> float:
    num_patches = (size // model.patch_size) ** 2
    tokens = torch.tensor([keep * num_patches + model.num_prefix_tokens]).numpy()
    return float(gflops_of_tokens(model)(tokens, num_patches)[0])


def _sizes_around(host_size: int, patch_size: int) -> list[int]:
    """Up to eight sides, multiples of two patches, from 0.8 to 1.5 times the host's own, and the host's own."""
    step = 2 * patch_size
    sides = [side for side in range(step, 2 * host_size, step) if 0.8 * host_size <= side <= 1.5 * host_size]
    stride = -(-len(sides) // 8)
    return sorted({*sides[::stride], host_size})


def write_config(result: TuningResult, model: str, file: Path) -> None:
    """Write a file for `aptvit.read_config`: the model's name, the image size, and the options for `aptvit.adapt`.

    Args:
        result: The calibration.
        model: timm's name of the host.
        file: Where to write; its folder is made if it does not exist.
    """
    settings = settings_of(adaptivity_of(result.model).patchifier)
    config = {"architecture": model, "size": result.size, "aptvit": settings, "calibration": result.to_dict()}
    write_json(file, config)
