"""Clips: read from files, and run in three ways side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from aptvit.encoder.clips import choose_rows
from aptvit.files.images import ImageError, find_images, open_image
from aptvit.measuring.timing import Spread, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["ClipRow", "compare_clips", "read_clip"]


@dataclass(frozen=True)
class ClipRow:
    """Clips with reuse between frames, beside the same frames one by one.

    Attributes:
        tolerance: As for ``forward_video``.
        tokens: Share of the patch tokens of uniform frames that is read.
        tokens_alone: Without reuse.
        agreement: Share of the frames with the answer that the adaptive model gives frame by frame.
        divergence: Kullback-Leibler divergence of the answers from those, in nats.
        speedup: Beside the adaptive model frame by frame.
        speedup_uniform: Beside the uniform model.
    """

    tolerance: float
    tokens: float
    tokens_alone: float
    agreement: float
    divergence: float
    speedup: Spread
    speedup_uniform: Spread

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_clip(path: Path, transform: Callable[[Image.Image], Any], frames: int) -> Tensor:
    """The first frames of a clip.

    Args:
        path: A video, an animated picture, or a folder of frames in the order of their names.
        transform: From a frame to (C, H, W) uint8.
        frames: How many at most.

    Returns:
        (T, C, H, W) uint8.

    Raises:
        ImageError: If it cannot be read, or has fewer than two frames.
        ImportError: If a video is to be read without PyAV.
    """
    if path.is_dir():
        found = [open_image(file) for file in find_images([path])[:frames]]
    else:
        found = _of_picture(path, frames) or _of_video(path, frames)
    if len(found) < 2:
        raise ImageError(f"{path} holds {len(found)} frame: give a video, an animated picture or a folder of frames")
    return torch.stack([torch.as_tensor(transform(one)) for one in found])


def _of_picture(path: Path, frames: int) -> list[Image.Image]:
    """Frames of an animated picture; none if it is no picture."""
    try:
        with Image.open(path) as picture:
            return [one.convert("RGB") for one in islice(ImageSequence.Iterator(picture), frames)]
    except UnidentifiedImageError:
        return []
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None


def _of_video(path: Path, frames: int) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise ImportError("videos are read by PyAV: pip install 'aptvit[video]'") from None
    try:
        with av.open(str(path)) as container:
            return [one.to_image() for one in islice(container.decode(video=0), frames)]
    except (av.FFmpegError, IndexError) as error:
        raise ImageError(f"{path} cannot be read as a video: {' '.join(str(error).split())}") from None


@torch.inference_mode()
def compare_clips(
    uniform: Any, model: AdaptivePatchTransformer, clips: Sequence[Tensor], tolerances: Sequence[float], rounds: int
) -> list[ClipRow]:
    """Time from frames in memory to logits, in turn, and what reuse changes.

    Args:
        uniform: The host.
        model: The adaptive model, in eval mode.
        clips: (T, C, H, W) uint8 each, where the models are.
        tolerances: A row for each.
        rounds: That are timed, after one that warms up.
    """
    device, dtype = clips[0].device, model.adapter.dtype
    normalised = [model.patchifier.normalization.normalised(clip).to(dtype) for clip in clips]
    alone = [model(clip).float().log_softmax(1) for clip in clips]
    runs: list[Callable[[], None]] = [partial(_each, uniform, normalised), partial(_each, model, clips)]
    runs += [partial(_each, partial(model.forward_video, tolerance=one), clips) for one in tolerances]
    interleaved(runs, 1, device)
    seconds = interleaved(runs, rounds, device)
    tokens_alone = torch.tensor([model.layout(clip).keep_ratio for clip in clips])
    rows = []
    for tolerance, times in zip(tolerances, seconds[2:], strict=True):
        found = [model.forward_video(clip, tolerance).float().log_softmax(1) for clip in clips]
        pairs = list(zip(found, alone, strict=True))
        rows.append(
            ClipRow(
                tolerance,
                float(
                    torch.tensor([choose_rows(model.patchifier, clip, tolerance).keep_ratio for clip in clips]).mean()
                ),
                float(tokens_alone.mean()),
                float(torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs]).float().mean()),
                float(torch.cat([(b.exp() * (b - a)).sum(1) for a, b in pairs]).mean()),
                Spread.of_ratios(seconds[1], times),
                Spread.of_ratios(seconds[0], times),
            )
        )
    return rows


def _each(run: Callable[[Tensor], Any], clips: Sequence[Tensor]) -> None:
    for clip in clips:
        run(clip)
