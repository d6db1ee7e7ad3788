"""Clips, run in three ways side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from aptvit.encoder.clips import choose_rows
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["ClipRow", "compare_clips"]


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
    speedup: Ratio
    speedup_uniform: Ratio

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    runs: list[Callable[[], None]] = [partial(_run_all, uniform, normalised), partial(_run_all, model, clips)]
    runs += [partial(_run_all, partial(model.forward_video, tolerance=value), clips) for value in tolerances]
    seconds = interleaved(runs, rounds, device, warmup=1)
    alone = [model(clip).float().log_softmax(1) for clip in clips]
    tokens_alone = fmean(model.layout(clip).keep_ratio for clip in clips)
    rows = []
    for tolerance, times in zip(tolerances, seconds[2:], strict=True):
        answers = [model.forward_video(clip, tolerance).float().log_softmax(1) for clip in clips]
        pairs = list(zip(answers, alone, strict=True))
        rows.append(
            ClipRow(
                tolerance,
                fmean(choose_rows(model.patchifier, clip, tolerance).keep_ratio for clip in clips),
                tokens_alone,
                float(torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs]).float().mean()),
                float(torch.cat([(b.exp() * (b - a)).sum(1) for a, b in pairs]).mean()),
                Ratio.of_rounds(seconds[1], times),
                Ratio.of_rounds(seconds[0], times),
            )
        )
    return rows


def _run_all(run: Callable[[Tensor], Any], clips: Sequence[Tensor]) -> None:
    for clip in clips:
        run(clip)
