"""Thresholds from a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from aptvit.api import adapt, adaptivity_of
from aptvit.calibration.calibrator import Calibration, Calibrator
from aptvit.files.images import ImageError, open_image
from aptvit.hosts.pretrained import Host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.checkpoints import settings_of
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.storage.writing import write_json

__all__ = ["FilesCalibration", "ImageStream", "calibrate_files", "write_config"]


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
class FilesCalibration:
    """Results of a calibration on image files.

    Attributes:
        model: The adaptive model with its thresholds set.
        calibration: Thresholds, target and result.
        size: Side of the images in pixels.
        skipped: Error messages of files that could not be read.
        speedup: Speed-up measured with these thresholds, for a target of speed.
    """

    model: Any
    calibration: Calibration
    size: int
    skipped: list[str]
    speedup: Ratio | None = None

    def to_dict(self) -> dict[str, Any]:
        """All attributes but the model, for JSON."""
        record: dict[str, Any] = {**self.calibration.to_dict(), "size": self.size, "skipped": self.skipped}
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
) -> FilesCalibration:
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
    return FilesCalibration(model, calibration, host.data["input_size"][-1], images.skipped, speedup=measured)


def _fit_scorer(model: Any, images: ImageStream) -> None:
    """Train a scorer that needs it."""
    if isinstance(adaptivity_of(model).patchifier.scorer, GlanceScorer):
        fit_glance(model, images)


@torch.inference_mode()
def _measured_speedup(model: AdaptivePatchTransformer, images: Tensor, rounds: int = 5) -> Ratio:
    runs = [partial(model, images, keep=1.0), partial(model, images)]
    interleaved(runs, 1, images.device)
    return Ratio.of_rounds(*interleaved(runs, rounds, images.device))


def write_config(result: FilesCalibration, model: str, file: Path) -> None:
    """Write a file for `aptvit.read_config`: the model's name, the image size, and the options for `aptvit.adapt`.

    Args:
        result: The calibration.
        model: timm's name of the host.
        file: Where to write; its folder is made if it does not exist.
    """
    settings = settings_of(adaptivity_of(result.model).patchifier)
    config = {"architecture": model, "size": result.size, "aptvit": settings, "calibration": result.to_dict()}
    write_json(file, config)
