"""Clips from files, compared one by one: reuse between frames beside the same frames by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import aptvit
from aptvit.calibration.calibrator import Target
from aptvit.compare.clips import ClipRow, compare_clips
from aptvit.files.clips import read_clip
from aptvit.files.images import ImageError
from aptvit.hosts.pretrained import Host, evaluation_transform
from aptvit.measuring.memory import keep_freed_memory

__all__ = ["ComparedClip", "compare_clip_files"]


@dataclass(frozen=True)
class ComparedClip:
    """What was measured on a clip.

    Attributes:
        clip: Its file or folder.
        frames: Frames that were read.
        rows: For each tolerance.
    """

    clip: str
    frames: int
    rows: list[ClipRow]

    def to_list(self) -> list[dict[str, Any]]:
        """For JSON: an object for each tolerance."""
        return [{"clip": self.clip, "frames": self.frames, **row.to_dict()} for row in self.rows]


def compare_clip_files(
    paths: Sequence[Path],
    host: Host,
    wish: Target,
    scorer: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    frames: int = 32,
    tolerances: Sequence[float] = (1.0, 2.0, 4.0),
    rounds: int = 3,
) -> tuple[list[ComparedClip], list[str]]:
    """Compare each clip; thresholds for a share are found on its own frames.

    Args:
        paths: Videos, animated images or folders of frames.
        host: The uniform model.
        wish: How many tokens.
        scorer: As for `aptvit.adapt`.
        dtype: Type that both models compute in.
        device: Where they run.
        frames: Of each clip, from its beginning.
        tolerances: As for ``forward_video``.
        rounds: Timed rounds.

    Returns:
        What was measured on each clip, and why others could not be read.

    Raises:
        ValueError: If no clip can be read.
        ImportError: If a video is to be read without PyAV.
    """
    keep_freed_memory()
    transform, clips, skipped = evaluation_transform(host.data), {}, []
    for path in paths:
        try:
            clips[str(path)] = read_clip(path, transform, frames).to(device)
        except ImageError as error:
            skipped.append(str(error))
    if not clips:
        raise ValueError(f"none of {len(paths)} clips can be read; the first: {skipped[0]}")
    uniform = host.model.to(device, dtype)
    model = aptvit.adapt(uniform, scorer=scorer, **wish.options()).eval()
    compared = []
    for name, clip in clips.items():
        if wish.calibrated:
            aptvit.calibrate(model, clip, keep=wish.keep)
        compared.append(ComparedClip(name, len(clip), compare_clips(uniform, model, [clip], tolerances, rounds)))
    return compared, skipped
