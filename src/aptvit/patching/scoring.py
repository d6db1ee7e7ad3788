"""How much would a big patch lose here? Scores of every candidate patch, from the pixels alone.

A scorer is any callable of the `Scorer` protocol; the three of the paper are here. A low score means that the patch
can be kept coarse. Patches that do not lie wholly inside the image have no score and are never kept coarse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.first_pass import FirstPass
from aptvit.patching.kernels import has_numba, has_triton

__all__ = [
    "SCORERS_OF_MODELS",
    "CountedScorer",
    "EntropyScorer",
    "ImageScorer",
    "LaplacianScorer",
    "ReadsTwice",
    "Scorer",
    "UpsampleScorer",
    "get_scorer",
    "to_gray",
]

# Weights of R, G, B in ten-thousandths: whole, so that the sum for a raw pixel is exact on every device.
_GRAY = (2989.0, 5870.0, 1140.0)
_GRAY_SUM = 10000.0


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


class ImageScorer(Protocol):
    """A scorer that can also read images as a model gets them, which spares a pass over the pixels."""

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `Scorer`, of images that are not on the 0..255 scale yet.

        Args:
            images: (B, C, H, W) raw pixels as uint8, or floats normalised with ``mean`` and ``std`` of [0, 1].
            mean: (C,).
            std: (C,).
            patch_size: Side of a base patch in pixels.
            factors: Sizes to score, in base patches.
        """
        ...


@runtime_checkable
class CountedScorer(Protocol):
    """A scorer whose operations are of note."""

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """Operations for one image of so many base patches, a multiplication and an addition counted as two.

        Args:
            factors: Sizes to score, in base patches.
        """
        ...


@runtime_checkable
class ReadsTwice(Protocol):
    """A scorer that runs the model's blocks, and leaves what they computed to a second pass (`aptvit.encoder.passes`).

    Where gradients are on it runs them as they are in training, and what they leave is learned.
    """

    def take_first_pass(self) -> FirstPass | None:
        """What they left of the images that were scored last, if they are large enough; forgotten here."""
        ...

    def rows_of_second_pass(self, tokens: np.ndarray, num_patches: int) -> np.ndarray:
        """How many of an image's tokens go through the blocks again, prefix tokens included.

        Args:
            tokens: Of the image, prefix tokens included.
            num_patches: Patch tokens of its uniform grid.
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
        weights = _GRAY if pixels.shape[1] == 3 else (_GRAY_SUM,)
        return self._maps(pixels, weights, 0.0, patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        if images.dtype == torch.uint8:
            return self(images, patch_size, factors)
        # gray = sum_c w_c 255 (std_c x_c + mean_c) is affine in x: undoing the normalisation costs nothing.
        gray = _GRAY if images.shape[1] == 3 else (_GRAY_SUM,)
        weights = tuple(255 * w * s for w, s in zip(gray, std, strict=False))
        offset = sum(255 * w * m for w, m in zip(gray, mean, strict=False))
        return self._maps(images, weights, offset, patch_size, factors)

    def _maps(
        self, images: Tensor, weights: tuple[float, ...], offset: float, patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """Entropy of the gray values sum_c weights_c x_c + offset, in ten-thousandths."""
        if not factors:
            return {}
        arguments = (weights, offset, self.bins / (255 * _GRAY_SUM), patch_size, tuple(factors), self.bins)
        return self._fastest(images.device)(images, *arguments)

    @staticmethod
    def _fastest(device: torch.device) -> Callable[..., dict[int, Tensor]]:
        """`entropy_maps`, or its fastest twin there."""
        if device.type == "cuda" and has_triton():
            from aptvit.patching.kernels import entropy_triton

            return entropy_triton.entropy_maps
        if device.type == "cpu" and has_numba():
            from aptvit.patching.kernels import entropy_numba

            return entropy_numba.entropy_maps
        return entropy_maps


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

    Histograms are additive, so one pass over the pixels serves all scales: those of a scale are the 2x2 sums of the
    finer one's. Runs on any device; the twins in `aptvit.patching.kernels` are checked against it.

    Args:
        images: (B, C, H, W) of any type; the first ``len(weights)`` channels are read.
        weights: Weight of each channel.
        offset: Added to the weighted sum.
        step: Bins per unit of the sum.
        patch_size: Side of a base patch in pixels.
        factors: Sizes to score, in base patches: powers of two.
        bins: Bins of the histogram.

    Returns:
        For each factor f, (B, H // (f p), W // (f p)).
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


def entropy_maps_scattered(pixels: Tensor, patch_size: int, factors: Sequence[int], bins: int) -> dict[int, Tensor]:
    """As `EntropyScorer` of pixels on the 0..255 scale, in operations that a graph can hold.

    Args:
        pixels: (B, C, H, W).
        patch_size: Side of a base patch in pixels.
        factors: Sizes to score, in base patches.
        bins: Bins of the histogram.
    """
    weights = _GRAY if pixels.shape[1] == 3 else (_GRAY_SUM,)
    level = _levels(pixels, weights, 0.0, bins / (255 * _GRAY_SUM), bins)
    counts = {factor: _histogram_scatter(level, factor * patch_size, bins) for factor in factors}
    return {factor: _entropy(one, (factor * patch_size) ** 2) for factor, one in counts.items()}


def _levels(images: Tensor, weights: Sequence[float], offset: float, step: float, bins: int) -> Tensor:
    """(B, C, H, W) -> (B, H, W) int32"""
    total = images[:, 0].float() * weights[0]
    for channel, weight in enumerate(weights[1:], start=1):
        total.add_(images[:, channel].float() * weight)  # two roundings, as the twins have them
    level = total.add_(offset).mul_(step).clamp_(0, bins - 1).to(torch.int32)
    return level.clamp_(min=0)  # NaN becomes a negative number; whoever counts the tokens says which image has it


def _bin_index(level: Tensor, cell: int, bins: int) -> Tensor:
    """(B, H, W) levels -> (B, h, cell, w, cell) index into (h, w, bins), incomplete cells cut off."""
    rows, cols = level.shape[1] // cell, level.shape[2] // cell
    level = level[:, : rows * cell, : cols * cell].unflatten(2, (cols, cell)).unflatten(1, (rows, cell))
    number = torch.arange(rows * cols, device=level.device).view(rows, 1, cols, 1)
    return level + number * bins


def _histogram_numpy(level: Tensor, cell: int, bins: int) -> Tensor:
    # numpy counts one image about four times faster than torch.bincount or scatter_add do on a CPU, and image by
    # image its tables stay in the cache.
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
    """(pixels + 1,) c log2 c, for each count that can occur. No tensor: one made while a graph is traced is none."""
    c = np.arange(1, pixels + 1, dtype=np.float64)
    return np.concatenate([[0.0], c * np.log2(c)]).astype(np.float32)


def _entropy(counts: Tensor, pixels: int) -> Tensor:
    """Entropy in bits of histograms (..., bins) of ``pixels`` values: log2 n - (1/n) sum c log2 c."""
    table = torch.from_numpy(_entropy_table(pixels)).to(counts.device)
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


SCORERS_OF_MODELS = ("embedding", "glance", "preview", "spread")  # made by the model itself


def get_scorer(scorer: str | Scorer) -> Scorer:
    """The scorer of this name, or the callable itself.

    Raises:
        ValueError: If there is no scorer of this name.
    """
    if callable(scorer):
        return scorer
    if scorer in SCORERS_OF_MODELS:
        raise ValueError(f"scorer {scorer!r} looks through a model's eyes: use it with a model, aptvit.adapt")
    if scorer not in _SCORERS:
        raise ValueError(
            f"unknown scorer {scorer!r}: use one of {', '.join((*_SCORERS, *SCORERS_OF_MODELS))}, or a callable"
        )
    return _SCORERS[scorer]()
