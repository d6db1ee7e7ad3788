"""Thresholds from a wish: half the tokens, on these images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aptvit.layout import scales_from_thresholds

if TYPE_CHECKING:
    from aptvit.inputs import Images
    from aptvit.model import AdaptivePatchTransformer
    from aptvit.patchify import Patchifier

__all__ = ["Wish", "calibrate"]

# For each grid size: the scores of its images. Score maps are small, so a pass over any number of images fits.
_Scores = dict[tuple[int, int], dict[int, Tensor]]


@dataclass(frozen=True)
class Wish:
    """How many tokens a person asked for.

    Attributes:
        thresholds: Thresholds to use as they are.
        keep: Share of the patch tokens.
        per_image: Every photo keeps that share; otherwise thresholds are calibrated so that the average does.
        scales: Patch sizes where ``keep`` decides.
    """

    thresholds: tuple[float, ...] | None = None
    keep: float = 0.5
    per_image: bool = False
    scales: int = 2

    def options(self) -> dict[str, Any]:
        """What `aptvit.adapt` takes."""
        if self.thresholds is not None:
            return {"thresholds": self.thresholds}
        return {"scales": self.scales, **({"keep": self.keep} if self.per_image else {})}

    @property
    def calibrated(self) -> bool:
        return self.thresholds is None and not self.per_image

    def __str__(self) -> str:
        if self.thresholds is not None:
            return "thresholds as given"
        share = f"{self.keep:.0%} of the patch tokens"
        return f"{share} of every photo" if self.per_image else f"{share} on average (calibrated on these photos)"


def calibrate(
    model: AdaptivePatchTransformer | Patchifier, images: Images | Iterable[Images], keep: float = 0.5
) -> tuple[float, ...]:
    """Set thresholds so that these images keep this share of their patch tokens on average.

    One threshold serves all scales. Busy images keep more than the average, smooth ones fewer.

    Args:
        model: The adaptive model, or a `Patchifier`; its thresholds are set.
        images: A batch, a list, or an iterable of either, read once.
        keep: Mean over the images of patch tokens kept / patch tokens of the uniform grid.

    Returns:
        The thresholds, from fine to coarse.

    Raises:
        ValueError: If there are no images, or no threshold reaches this share; the message names the range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r} must be a share of the patch tokens in (0, 1]")
    if model.num_scales < 2:
        raise ValueError("a model with one scale merges nothing: adapt it with scales=2 or more")
    scores = _collect(model, images)
    threshold = _find_threshold(scores, model.num_scales, keep)
    model.thresholds = (threshold,) * (model.num_scales - 1)
    return (threshold,) * (model.num_scales - 1)


def _collect(model: AdaptivePatchTransformer | Patchifier, images: Images | Iterable[Images]) -> _Scores:
    parts: dict[tuple[int, int], dict[int, list[Tensor]]] = {}
    for batch in _batches(images):
        for group, scores in model.scores(batch):
            grid = (group.images.shape[2] // model.patch_size, group.images.shape[3] // model.patch_size)
            kept = parts.setdefault(grid, {factor: [] for factor in scores})
            for factor, one in scores.items():
                kept[factor].append(one.float().cpu())
    if not parts:
        raise ValueError("there are no images to calibrate on: give at least one")
    return {grid: {factor: torch.cat(ones) for factor, ones in kept.items()} for grid, kept in parts.items()}


def _batches(images: Images | Iterable[Images]) -> Iterable[Images]:
    if isinstance(images, Tensor):
        return [images]
    if isinstance(images, Sequence) and all(isinstance(one, Tensor) and one.ndim == 3 for one in images):
        return [[one] for one in images]
    return images


def _find_threshold(scores: _Scores, num_scales: int, keep: float) -> float:
    """The threshold, half-way between two scores, whose mean share of kept tokens is nearest to ``keep``."""
    flat = torch.cat([one.flatten() for maps in scores.values() for one in maps.values()]).numpy()
    values = np.unique(flat[np.isfinite(flat)])
    if not len(values):
        raise ValueError(f"these images are too small to hold a coarse patch: keep={keep:g} cannot be reached, only 1")
    # Merging strictly below candidates[i] merges the i lowest values.
    candidates = np.concatenate([[values[0]], (values[:-1] + values[1:]) / 2, [np.nextafter(values[-1], np.inf)]])
    low, high = 0, len(candidates) - 1
    least = _mean_share(scores, num_scales, candidates[high])
    if keep < least - 0.005:
        raise ValueError(
            f"keep={keep:g} cannot be reached on these images with {num_scales} scales: from {least:.3f} to 1 is "
            "possible. Ask for more, or give more scales"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if _mean_share(scores, num_scales, candidates[middle]) >= keep:
            low = middle
        else:
            high = middle
    return float(min(candidates[low : high + 1], key=lambda t: abs(_mean_share(scores, num_scales, t) - keep)))


def _mean_share(scores: _Scores, num_scales: int, threshold: float) -> float:
    shares = []
    for grid, maps in scores.items():
        num_images = len(next(iter(maps.values())))
        scale_map = scales_from_thresholds(maps, [threshold] * (num_scales - 1), grid, num_images)
        # A cell under a patch of scale i is 1/4^i of a token.
        shares.append(torch.pow(0.25, scale_map.float()).mean((1, 2)))
    return float(torch.cat(shares).mean())
