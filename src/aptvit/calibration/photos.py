"""From a folder of photos to a configuration: thresholds, and if wished the size of the pictures too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor

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

__all__ = ["Candidate", "PhotoStream", "Tuned", "calibrate_photos", "choose_resolution", "write_config"]


class PhotoStream:
    """Batches of photos as uint8, read one after the other through timm's evaluation transform; can be read again.

    A file that cannot be read is left out and reported.

    Args:
        paths: Image files.
        data: timm's data configuration of the model.
        size: Side of the pictures in pixels; the configuration's own by default.
        batch_size: Photos per batch; the last one may hold fewer.
        device: Where the batches are to be.
        progress: Wraps the files.

    Attributes:
        skipped: Why files were left out.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        data: dict[str, Any],
        size: int | None = None,
        batch_size: int = 16,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        if size is not None:
            data = {**data, "input_size": (data["input_size"][0], size, size)}
        self._transform = create_transform(**data, is_training=False, use_prefetcher=True)  # uint8, not normalised
        self.paths, self.batch_size, self.device, self.progress = paths, batch_size, device, progress
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Tensor]:
        self.skipped, ready = [], []
        for path in self.progress(self.paths, "reading photos", len(self.paths)):
            try:
                ready.append(torch.as_tensor(self._transform(open_image(path))))
            except ImageError as error:
                self.skipped.append(str(error))
                continue
            if len(ready) == self.batch_size:
                yield torch.stack(ready).to(self.device)
                ready = []
        if ready:
            yield torch.stack(ready).to(self.device)
        if len(self.skipped) == len(self.paths):
            raise ValueError(f"none of {len(self.paths)} files can be read as an image; the first: {self.skipped[0]}")


@dataclass(frozen=True)
class Candidate:
    """One size of the pictures, calibrated to the common cost.

    Attributes:
        size: Side in pixels.
        calibration: Thresholds found there.
        agreement: Share of the photos with the full model's answer.
        divergence: Mean Kullback-Leibler divergence of the answers from the full model's, in nats: what is compared,
            as it says more than agreement does on a few photos.
    """

    size: int
    calibration: Calibration
    agreement: float
    divergence: float


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        model: The adaptive model with its thresholds set.
        calibration: How well they meet the wish.
        size: Side of the pictures in pixels.
        skipped: Files that could not be read.
        candidates: All sizes that were tried, if the size was to be found too.
        speedup: Measured with the thresholds found, if a speed-up was asked for.
    """

    model: AdaptivePatchTransformer
    calibration: Calibration
    size: int
    skipped: list[str]
    candidates: list[Candidate] = field(default_factory=list)
    speedup: Ratio | None = None

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {**self.calibration.to_dict(), "size": self.size, "skipped": self.skipped}
        if self.candidates:
            found["candidates"] = [asdict(one) for one in self.candidates]
        if self.speedup is not None:
            found["measured_speedup"] = asdict(self.speedup)
        return found


def calibrate_photos(
    host: Host,
    paths: Sequence[Path],
    wish: dict[str, float],
    options: dict[str, Any],
    *,
    hold_back: int = 5,
    device: str = "cpu",
    progress: Progress = silent,
) -> Tuned:
    """Find thresholds for a wish in one pass over photos, in bounded memory.

    Args:
        host: The uniform model.
        paths: Image files.
        wish: ``{"keep": …}``, ``{"gflops": …}`` or ``{"speedup": …}``.
        options: For `aptvit.adapt`: scorer (``"glance"`` is fitted on these photos first), scales, limits.
        hold_back: Every n-th photo also tells how well the thresholds of the others carry over; 0 for none.
        device: Where to run.
        progress: Wraps long work.

    Raises:
        ValueError: If no photo can be read, or the wish cannot be met.
    """
    if device == "cpu":
        keep_freed_memory()
    model = AdaptivePatchTransformer(host.model.to(device).requires_grad_(False), **options)
    photos = PhotoStream(paths, host.data, device=device, progress=progress)
    _teach(model, photos)
    calibrator, first = None, None
    for batch in photos:
        if calibrator is None:
            calibrator, first = Calibrator.of_wish(model, wish, batch[:8], hold_back=hold_back), batch
        calibrator.add(batch)
    assert calibrator is not None and first is not None
    calibration = calibrator.solve()
    measured = _measured_speedup(model, first) if "speedup" in wish else None
    return Tuned(model, calibration, host.data["input_size"][-1], photos.skipped, speedup=measured)


def _teach(model: AdaptivePatchTransformer, photos: PhotoStream) -> None:
    """A glance has to learn before it can be asked."""
    if isinstance(model.patchifier.scorer, GlanceScorer):
        fit_glance(model, photos)


@torch.inference_mode()
def _measured_speedup(model: AdaptivePatchTransformer, images: Tensor, rounds: int = 5) -> Ratio:
    runs = [partial(model, images, keep=1.0), partial(model, images)]
    interleaved(runs, 1, images.device)
    return Ratio.of_rounds(*interleaved(runs, rounds, images.device))


def choose_resolution(
    host: Host,
    paths: Sequence[Path],
    wish: dict[str, float],
    options: dict[str, Any],
    *,
    sizes: Sequence[int] | None = None,
    max_photos: int = 256,
    device: str = "cpu",
    progress: Progress = silent,
) -> Tuned:
    """Choose size and thresholds together: at equal operations, what answers most like the full model.

    No labels are needed. A larger picture with more merging and a smaller one with less can cost the same; which is
    better depends on model and photos.

    Args:
        host: The uniform model at its own size: the one to agree with.
        paths: Image files; thresholds are found on all of them.
        wish: ``{"keep": …}`` of the tokens at the model's own size, or ``{"gflops": …}``.
        options: For `aptvit.adapt`.
        sizes: Sides in pixels to try; from 0.8 to 1.5 times the model's own by default.
        max_photos: Photos to compare answers on.
        device: Where to run.
        progress: Wraps long work.

    Raises:
        ValueError: If no size can meet the wish, or the model has no classes to compare.
    """
    if host.model.num_classes == 0 or host.weights == "random":
        raise ValueError("resolution auto compares answers: it needs a model with classes and trained weights")
    if "speedup" in wish:
        raise ValueError(f"resolution auto compares at equal operations: give keep or gflops, not {wish}")
    model = AdaptivePatchTransformer(host.model.to(device).requires_grad_(False), **options)
    own = host.data["input_size"][-1]
    gflops = wish.get("gflops") or _gflops_of_share(model, wish["keep"], own)
    some = paths[:max_photos]
    _teach(model, PhotoStream(paths, host.data, device=device, progress=progress))
    full = _answers(host.model, model, PhotoStream(some, host.data, device=device), progress)
    candidates, refused, skipped = [], [], []
    sizes = sizes or _sizes_around(own, model.patch_size)
    for size in progress(sizes, "trying sizes", len(sizes)):
        photos = PhotoStream(paths, host.data, size, device=device)
        try:
            calibrator = None
            for batch in photos:
                calibrator = calibrator or Calibrator.of_wish(model, {"gflops": gflops}, batch, hold_back=5)
                calibrator.add(batch)
            assert calibrator is not None
            calibration = calibrator.solve()
        except ValueError as error:
            refused.append(f"{size} px: {error}")
            continue
        skipped = photos.skipped
        got = _answers(model, model, PhotoStream(some, host.data, size, device=device), silent)
        agreement = float((got.argmax(1) == full.argmax(1)).float().mean())
        divergence = F.kl_div(got.log_softmax(1), full.log_softmax(1), log_target=True, reduction="batchmean")
        candidates.append(Candidate(size, calibration, agreement, float(divergence)))
    if not candidates:
        raise ValueError(f"no size can meet gflops={gflops:.3g}; {refused[0]}")
    best = min(candidates, key=lambda one: one.divergence)
    model.thresholds = best.calibration.thresholds
    model.patchifier.calibration = {**best.calibration.to_dict(), "size": best.size}
    return Tuned(model, best.calibration, best.size, skipped, candidates)


@torch.inference_mode()
def _answers(
    run: Callable[[Tensor], Tensor], model: AdaptivePatchTransformer, photos: PhotoStream, progress: Progress
) -> Tensor:
    batches = progress(photos, "running the full model", -(-len(photos.paths) // photos.batch_size))
    return torch.cat([run(model.patchifier.normalization.normalised(batch)).float().cpu() for batch in batches])


def _gflops_of_share(model: AdaptivePatchTransformer, keep: float, size: int) -> float:
    num_patches = (size // model.patch_size) ** 2
    tokens = torch.tensor([keep * num_patches + model.num_prefix_tokens]).numpy()
    return float(gflops_of_tokens(model)(tokens, num_patches)[0])


def _sizes_around(own: int, patch_size: int) -> list[int]:
    """Up to eight sides, whole numbers of double patches, from 0.8 to 1.5 times a model's own."""
    step = 2 * patch_size
    sides = [side for side in range(step, 2 * own, step) if 0.8 * own <= side <= 1.5 * own]
    every = -(-len(sides) // 8)
    return sorted({*sides[::every], own})


def write_config(tuned: Tuned, model: str, file: Path) -> None:
    """Write what `read_config` reads: the model's name, the size, and the options for `aptvit.adapt`."""
    settings = settings_of(tuned.model.patchifier)
    config = {"architecture": model, "size": tuned.size, "aptvit": settings, "calibration": tuned.to_dict()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
