"""Entropy of patches in plain torch, the reference for the kernels in Triton and numba."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["entropy_maps", "entropy_maps_scattered"]


def entropy_maps(
    images: Tensor,
    weights: Sequence[float],
    offset: float,
    step: float,
    patch_size: int,
    factors: Sequence[int],
    bins: int,
) -> dict[int, Tensor]:
    """Entropy in bits of the values trunc(step (sum_c weights_c x_c + offset)), clamped to 0..bins-1, in each patch.

    Histograms are additive, so one pass over the pixels serves all scales: the histograms of a scale are 2x2 sums of
    those of the next finer scale. Runs on any device.

    Args:
        images: (B, C, H, W) of any type; the first ``len(weights)`` channels are read.
        weights: Weight of each channel.
        offset: Added to the weighted sum.
        step: Bins per unit of the sum.
        patch_size: Side of a base patch in pixels.
        factors: Sizes to score, in base patches: powers of two.
        bins: Bins of the histogram.

    Returns:
        For each factor f, (B, H // (f p), W // (f p)) float32.
    """
    level = _levels(images, weights, offset, step, bins)
    histogram = _histogram_numpy if level.device.type == "cpu" else _histogram_scatter
    factor = min(factors)
    counts = histogram(level, factor * patch_size, bins)
    maps: dict[int, Tensor] = {}
    while True:
        if factor in factors:
            maps[factor] = _entropy(counts, (factor * patch_size) ** 2)
        if factor >= max(factors):
            return maps
        factor *= 2
        rows, cols = counts.shape[1] // 2, counts.shape[2] // 2
        # (B, h, w, bins) -> (B, h/2, 2, w/2, 2, bins) -> (B, h/2, w/2, bins)
        even = counts[:, : 2 * rows, : 2 * cols]
        counts = even.unflatten(2, (cols, 2)).unflatten(1, (rows, 2)).sum((2, 4), dtype=counts.dtype)


def entropy_maps_scattered(
    images: Tensor,
    weights: Sequence[float],
    offset: float,
    step: float,
    patch_size: int,
    factors: Sequence[int],
    bins: int,
) -> dict[int, Tensor]:
    """`entropy_maps` in operations that can be exported: one histogram for each factor, without numpy."""
    level = _levels(images, weights, offset, step, bins)
    counts = {factor: _histogram_scatter(level, factor * patch_size, bins) for factor in factors}
    return {factor: _entropy(count, (factor * patch_size) ** 2) for factor, count in counts.items()}


def _levels(images: Tensor, weights: Sequence[float], offset: float, step: float, bins: int) -> Tensor:
    """(B, C, H, W) -> (B, H, W) int32"""
    total = images[:, 0].float() * weights[0]
    for channel, weight in enumerate(weights[1:], start=1):
        total.add_(images[:, channel].float() * weight)  # two roundings, as in the other kernels
    level = total.add_(offset).mul_(step).clamp_(0, bins - 1).to(torch.int32)
    return level.clamp_(min=0)  # NaN becomes a negative number; PatchLayout.from_scale_map names the image


def _bin_index(level: Tensor, cell: int, bins: int) -> Tensor:
    """(B, H, W) levels -> (B, h, cell, w, cell) index into (h, w, bins), incomplete cells cut off."""
    rows, cols = level.shape[1] // cell, level.shape[2] // cell
    level = level[:, : rows * cell, : cols * cell].unflatten(2, (cols, cell)).unflatten(1, (rows, cell))
    number = torch.arange(rows * cols, device=level.device).view(rows, 1, cols, 1)
    return level + number * bins


def _histogram_numpy(level: Tensor, cell: int, bins: int) -> Tensor:
    # On a CPU numpy counts about four times faster than torch.bincount or scatter_add. One image at a time, so that the
    # counts stay in the CPU's cache.
    rows, cols = level.shape[1] // cell, level.shape[2] // cell
    counts = torch.empty(len(level), rows, cols, bins, dtype=torch.int64)
    for out, index in zip(counts, _bin_index(level, cell, bins), strict=True):
        out.copy_(torch.from_numpy(np.bincount(index.numpy().ravel(), minlength=out.numel())).view_as(out))
    return counts


def _histogram_scatter(level: Tensor, cell: int, bins: int) -> Tensor:
    batch, rows, cols = len(level), level.shape[1] // cell, level.shape[2] // cell
    index = _bin_index(level, cell, bins).flatten(1)
    counts = torch.zeros(batch, rows * cols * bins, dtype=torch.int32, device=level.device)
    counts.scatter_add_(1, index, torch.ones((), dtype=torch.int32, device=level.device).expand_as(index))
    return counts.view(batch, rows, cols, bins)


@cache
def _entropy_table(pixels: int) -> np.ndarray:
    """(pixels + 1,) c log2 c of each count c. An array: a tensor made during tracing could not be cached."""
    c = np.arange(1, pixels + 1, dtype=np.float64)
    return np.concatenate([[0.0], c * np.log2(c)]).astype(np.float32)


def _entropy(counts: Tensor, pixels: int) -> Tensor:
    """Entropy in bits of histograms (..., bins) of ``pixels`` values: log2 n - (1/n) sum c log2 c."""
    table = torch.from_numpy(_entropy_table(pixels)).to(counts.device)
    return (math.log2(pixels) - table.take(counts.long()).sum(-1) / pixels).clamp_(min=0)
