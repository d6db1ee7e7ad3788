"""Clips compared in three ways: with reuse between frames, frame by frame, and by the uniform model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import aptvit
from aptvit.calibration.calibrator import Target
from aptvit.encoder.clips import choose_rows
from aptvit.files.clips import read_clip
from aptvit.files.images import read_each
from aptvit.hosts.pretrained import Host, evaluation_transform
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, paired_rounds
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["ClipResult", "ClipRow", "compare_clip_files", "compare_clips"]


@dataclass(frozen=True)
class ClipRow:
    """Clips with reuse between frames, relative to the same frames one by one.

    Attributes:
        tolerance: As for ``forward_video``.
        tokens: Share of the patch tokens of uniform frames that goes through the blocks.
        tokens_alone: The same share without reuse.
        agreement: Share of the frames with the same top-1 class as without reuse.
        divergence: Kullback-Leibler divergence of the probabilities from those without reuse, in nats.
        speedup: Speed relative to the adaptive model frame by frame.
        speedup_uniform: Speed relative to the uniform model.
    """

    tolerance: float
    tokens: float
    tokens_alone: float
    agreement: float
    divergence: float
    speedup: Ratio
    speedup_uniform: Ratio


@dataclass(frozen=True)
class ClipResult:
    """Measurements on a clip.

    Attributes:
        clip: File or folder of the clip.
        frames: Number of frames.
        rows: A row for each tolerance.
    """

    clip: str
    frames: int
    rows: list[ClipRow]

    def to_list(self) -> list[dict[str, Any]]:
        """An object for each tolerance, for JSON."""
        return [{"clip": self.clip, "frames": self.frames, **asdict(row)} for row in self.rows]


def compare_clip_files(
    paths: Sequence[Path],
    host: Host,
    target: Target,
    scorer: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    frames: int = 32,
    tolerances: Sequence[float] = (1.0, 2.0, 4.0),
    rounds: int = 3,
) -> tuple[list[ClipResult], list[str]]:
    """Compare each clip; thresholds for a share are calibrated on the frames of the clip.

    Args:
        paths: Videos, animated images or folders of frames.
        host: The uniform model.
        target: Thresholds, or the share of the tokens.
        scorer: As for `aptvit.adapt`.
        dtype: Type that both models compute in.
        device: Device that both models run on.
        frames: Most frames of a clip, from its beginning.
        tolerances: As for ``forward_video``.
        rounds: Timed rounds.

    Returns:
        The results of each clip, and messages for clips that could not be read.

    Raises:
        ValueError: If no clip can be read.
        ImportError: If a clip is a video and PyAV is not installed.
    """
    keep_freed_memory()
    clips, skipped = read_each(paths, lambda path: read_clip(path, evaluation_transform(host.data), frames).to(device))
    uniform = host.model.to(device, dtype)
    model = aptvit.adapt(uniform, scorer=scorer, **target.options()).eval()
    results = []
    for path, clip in clips:
        if target.calibrated:
            aptvit.calibrate(model, clip, keep=target.keep)
        results.append(ClipResult(str(path), len(clip), compare_clips(uniform, model, [clip], tolerances, rounds)))
    return results, skipped


@torch.inference_mode()
def compare_clips(
    uniform: Any, model: AdaptivePatchTransformer, clips: Sequence[Tensor], tolerances: Sequence[float], rounds: int
) -> list[ClipRow]:
    """Measure time from frames in memory to logits, interleaved, and the effect of reuse on the logits.

    Args:
        uniform: The host.
        model: The adaptive model, in eval mode.
        clips: (T, C, H, W) uint8 each, on the device of the models.
        tolerances: As for ``forward_video``.
        rounds: Timed rounds, after one to warm up.

    Returns:
        A row for each tolerance, over all clips.
    """
    device, dtype = clips[0].device, model.adapter.dtype
    pairs = [(clip, model.patchifier.normalization.normalised(clip).to(dtype)) for clip in clips]
    sides: list[Any] = [lambda pair: uniform(pair[1]), lambda pair: model(pair[0])]
    sides += [lambda pair, value=value: model.forward_video(pair[0], value) for value in tolerances]
    seconds = paired_rounds(sides, pairs, rounds, device, warmup=1)
    by_frame = torch.cat([model(clip) for clip in clips]).float().log_softmax(1)
    tokens_by_frame = fmean(model.layout(clip).keep_ratio for clip in clips)
    rows = []
    for tolerance, times in zip(tolerances, seconds[2:], strict=True):
        reused = torch.cat([model.forward_video(clip, tolerance) for clip in clips]).float().log_softmax(1)
        tokens = fmean(choose_rows(model.patchifier, clip, tolerance).keep_ratio for clip in clips)
        agreement = float((reused.argmax(1) == by_frame.argmax(1)).float().mean())
        divergence = float((by_frame.exp() * (by_frame - reused)).sum(1).mean())
        speedups = [Ratio.of_rounds(reference, times) for reference in (seconds[1], seconds[0])]
        rows.append(ClipRow(tolerance, tokens, tokens_by_frame, agreement, divergence, *speedups))
    return rows
