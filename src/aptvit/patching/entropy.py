"""Entropy of gray values: the paper's score (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aptvit.patching.kernels import has_numba, has_triton
from aptvit.patching.kernels.entropy_torch import entropy_maps

__all__ = ["EntropyScorer"]

# Weights of R, G, B in ten-thousandths: whole, so that the sum for a raw pixel is exact on every device.
_GRAY = (2989.0, 5870.0, 1140.0)
_GRAY_SUM = 10000.0

Kernel = Callable[..., dict[int, Tensor]]


class EntropyScorer:
    """Entropy of the gray values in bits (section 3.1, Eq. 1): H(P) = -sum_v p(v) log2 p(v).

    A `Scorer` and an `ImageScorer`. Of other than three channels it is the mean of the channels' entropies. Values are
    binned as ``torch.histc(bins=512, min=0, max=255)`` bins them.

    Args:
        bins: Equal bins over [0, 255].
        kernel: An implementation of `entropy_maps`; by default the fastest on the device of the images.
    """

    name = "entropy"

    def __init__(self, bins: int = 512, kernel: Kernel | None = None) -> None:
        self.bins, self._kernel = bins, kernel

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        return self._maps(pixels, [1.0] * pixels.shape[1], [0.0] * pixels.shape[1], patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        if images.dtype == torch.uint8:
            return self(images, patch_size, factors)
        # gray = sum_c w_c 255 (std_c x_c + mean_c) is affine in x: undoing the normalisation costs nothing.
        return self._maps(images, [255 * s for s in std], [255 * m for m in mean], patch_size, factors)

    def _maps(
        self, images: Tensor, gain: Sequence[float], shift: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """Entropy of the gray values of pixels gain_c x_c + shift_c; where there are not three channels, the mean of
        their entropies."""
        kernel, step = self._kernel or _fastest_kernel(images.device), self.bins / (255 * _GRAY_SUM)
        parts = [(images, _GRAY)] if images.shape[1] == 3 else [(part, (_GRAY_SUM,)) for part in images.split(1, dim=1)]
        maps = []
        for number, (part, gray) in enumerate(parts if factors else ()):
            weights = tuple(w * g for w, g in zip(gray, gain[number:], strict=False))
            offset = sum(w * s for w, s in zip(gray, shift[number:], strict=False))
            maps.append(kernel(part, weights, offset, step, patch_size, tuple(factors), self.bins))
        return maps[0] if len(maps) == 1 else {f: torch.stack([scores[f] for scores in maps]).mean(0) for f in factors}


def _fastest_kernel(device: torch.device) -> Kernel:
    """The fastest implementation of `entropy_maps` on this device."""
    if device.type == "cuda" and has_triton():
        from aptvit.patching.kernels import entropy_triton

        return entropy_triton.entropy_maps
    if device.type == "cpu" and has_numba():
        from aptvit.patching.kernels import entropy_numba

        return entropy_numba.entropy_maps
    return entropy_maps
