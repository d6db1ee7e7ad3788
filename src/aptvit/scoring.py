"""How much would a big patch lose here? Scores of every candidate patch, from the pixels alone.

A scorer is any callable of the `Scorer` protocol; the three of the paper are here. A low score means that the patch
can be kept coarse. Patches that do not lie wholly inside the image have no score and are never kept coarse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EntropyScorer", "LaplacianScorer", "Scorer", "UpsampleScorer", "get_scorer", "to_gray"]


class Scorer(Protocol):
    """Anything that scores candidate patches."""

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """Score the patches of each size.

        Args:
            pixels: (B, C, H, W) float32 on the 0..255 scale; H and W are multiples of ``patch_size``.
            patch_size: Side of a base patch in pixels.
            factors: Sizes to score, in base patches: 2, 4, 8, ...

        Returns:
            For each factor f, (B, H // (f p), W // (f p)) scores of the patches that lie wholly inside the image.
        """
        ...


def to_gray(pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W): 0.2989 R + 0.5870 G + 0.1140 B; the first channel of anything but three."""
    if pixels.shape[1] != 3:
        return pixels[:, 0]
    return (pixels[:, 0] * 0.2989).add_(pixels[:, 1], alpha=0.5870).add_(pixels[:, 2], alpha=0.1140)


class EntropyScorer:
    """Entropy of the gray values in bits (section 3.1, Eq. 1): H(P) = -sum_v p(v) log2 p(v).

    Gray values are binned as ``torch.histc(bins=512, min=0, max=255)`` bins them. Histograms are additive, so one pass
    over the pixels serves all scales: those of a scale are the 2x2 sums of the finer one's.

    Args:
        bins: Equal bins over [0, 255].
    """

    def __init__(self, bins: int = 512) -> None:
        self.bins = bins

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        if not factors:
            return {}
        finest = min(factors)
        level = (to_gray(pixels) * (self.bins / 255)).to(torch.int32).clamp_(0, self.bins - 1)
        histogram = self._histogram_numpy if level.device.type == "cpu" else self._histogram_scatter
        maps: dict[int, Tensor] = {}
        counts, factor = histogram(level, finest * patch_size), finest
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

    def _bin_index(self, level: Tensor, cell: int) -> Tensor:
        """(B, H, W) gray levels -> (B, h, cell, w, cell) index into (h, w, bins), incomplete cells cut off."""
        rows, cols = level.shape[1] // cell, level.shape[2] // cell
        level = level[:, : rows * cell, : cols * cell].unflatten(2, (cols, cell)).unflatten(1, (rows, cell))
        number = torch.arange(rows * cols, device=level.device).view(rows, 1, cols, 1)
        return level + number * self.bins

    def _histogram_numpy(self, level: Tensor, cell: int) -> Tensor:
        # numpy counts one image about four times faster than torch.bincount or scatter_add do on a CPU, and image by
        # image its tables stay in the cache.
        rows, cols = level.shape[1] // cell, level.shape[2] // cell
        counts = torch.empty(len(level), rows, cols, self.bins, dtype=torch.int64)
        for out, index in zip(counts, self._bin_index(level, cell), strict=True):
            out.copy_(torch.from_numpy(np.bincount(index.numpy().ravel(), minlength=out.numel())).view_as(out))
        return counts

    def _histogram_scatter(self, level: Tensor, cell: int) -> Tensor:
        batch, rows, cols = len(level), level.shape[1] // cell, level.shape[2] // cell
        index = self._bin_index(level, cell).flatten(1)
        counts = torch.zeros(batch, rows * cols * self.bins, dtype=torch.int32, device=level.device)
        counts.scatter_add_(1, index, torch.ones((), dtype=torch.int32, device=level.device).expand_as(index))
        return counts.view(batch, rows, cols, self.bins)


def _entropy(counts: Tensor, pixels: int) -> Tensor:
    """Entropy in bits of histograms (..., bins) of ``pixels`` values: log2 n - (1/n) sum c log2 c."""
    c = torch.arange(pixels + 1, dtype=torch.float64, device=counts.device)
    table = torch.xlogy(c, c).div_(math.log(2)).float()  # c log2 c, one entry for each count that can occur
    return (math.log2(pixels) - table.take(counts.long()).sum(-1) / pixels).clamp_(min=0)


class LaplacianScorer:
    """Mean absolute response of the 8-connected Laplacian on gray values in [0, 1], edges reflected (figure 10)."""

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        gray = to_gray(pixels).div(255).unsqueeze(1)  # (B, 1, H, W)
        neighbourhood = F.avg_pool2d(F.pad(gray, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
        response = (gray - neighbourhood).abs_().mul_(9)  # |8 x - the eight neighbours|
        return {factor: _cell_means(response, factor * patch_size) for factor in factors}


def _cell_means(response: Tensor, side: int) -> Tensor:
    """(B, 1, H, W) -> (B, H // side, W // side), incomplete cells cut off; there may be none."""
    batch, _, height, width = response.shape
    if height < side or width < side:
        return response.new_zeros(batch, height // side, width // side)
    return F.avg_pool2d(response, side).squeeze(1)


class UpsampleScorer:
    """Mean squared error of the image in [0, 1] after bilinear reduction by the patch's factor and back (figure 10)."""

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        pixels = pixels / 255
        maps = {}
        for factor in factors:
            side = factor * patch_size
            whole = pixels[:, :, : pixels.shape[2] // side * side, : pixels.shape[3] // side * side]
            if whole.numel() == 0:  # too small for such a patch, and for interpolation
                maps[factor] = _cell_means(whole[:, :1], side)
                continue
            small = F.interpolate(whole, scale_factor=1 / factor, mode="bilinear", align_corners=False)
            back = F.interpolate(small, size=whole.shape[2:], mode="bilinear", align_corners=False)
            maps[factor] = _cell_means((back - whole).square_().mean(1, keepdim=True), side)
        return maps


_SCORERS: dict[str, Callable[[], Scorer]] = {
    "entropy": EntropyScorer,
    "laplacian": LaplacianScorer,
    "upsample": UpsampleScorer,
}


def get_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of this name, or the callable itself.

    Raises:
        ValueError: If there is no scorer of this name.
    """
    if callable(scorer):
        return scorer
    if scorer not in _SCORERS:
        raise ValueError(f"unknown scorer {scorer!r}: use one of {', '.join(_SCORERS)}, or a callable")
    return _SCORERS[scorer]()
