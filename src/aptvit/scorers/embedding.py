"""Scores by the distance of a coarse patch from its base patches in the host's own embedding space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.layers.patch_embed import AffineMaps, resize_weight

__all__ = ["EmbeddingScorer"]


class EmbeddingScorer:
    """Squared distance of a coarse patch's embedding from the mean of its base patches' embeddings.

        score(P) = || E(resize(P)) - mean_j E(P_j) ||^2

    Both are linear in the pixels, so each scale is one convolution. A fixed random projection to ``dims`` dimensions,
    which preserves distances on average, makes it cheap for small models too. There are no new parameters.

    Args:
        maps: Returns the affine maps of the host's current patch embedding.
        dims: Dimensions of the projection; None for no projection.
    """

    name = "embedding"

    def __init__(self, maps: Callable[[], AffineMaps], dims: int | None = 64) -> None:
        self._maps = maps
        self._dims = dims
        self._cached: tuple[AffineMaps, dict[int, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # a copy of the model has maps of its own

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.Scorer`, for pixels that the host reads without normalisation."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.ImageScorer`."""
        if images.dtype == torch.uint8:
            shift, scale = torch.tensor([mean, std])[:, None, :, None, None].to(images.device, non_blocking=True)
            images = (images.float() / 255 - shift) / scale
        differences = self._differences(factors)
        maps = {}
        for factor in factors:
            difference = differences[factor]
            rows, cols = (side // (factor * patch_size) for side in images.shape[2:])
            if rows * cols == 0:  # smaller than one patch
                maps[factor] = images.new_zeros(len(images), rows, cols, dtype=torch.float32)
                continue
            moved = F.conv2d(images.float(), difference, stride=factor * patch_size)  # (B, dims, h, w)
            maps[factor] = moved.square().sum(1)
        return maps

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.patching.scoring.CountedScorer`: each size is a convolution over all pixels."""
        weight = self._maps().weight
        per_patch = 2.0 * min(self._dims or len(weight), len(weight)) * weight[0].numel() * len(factors)
        return lambda num_patches: per_patch * num_patches

    @torch.no_grad()
    def _differences(self, factors: Sequence[int]) -> dict[int, Tensor]:
        """For each factor f, (dims, C, f p, f p) weight of the coarse embedding minus that of the mean of fine ones."""
        maps, cached = self._maps(), self._cached
        if cached is None or cached[0] is not maps:
            self._cached = cached = (maps, {})
        for factor in factors:
            if factor not in cached[1]:
                cached[1][factor] = self._difference(maps.weight.float(), factor)
        return cached[1]

    def _difference(self, weight: Tensor, factor: int) -> Tensor:
        """(D, C, p, p) -> (dims, C, factor p, factor p)"""
        width = len(weight)
        if self._dims is not None and self._dims < width:
            # Orthonormal, and the same on every device and for every model of this width.
            random = torch.randn(width, self._dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            projection = torch.linalg.qr(random).Q.T.to(weight) * (width / self._dims) ** 0.5
            weight = torch.einsum("kd,dchw->kchw", projection, weight)
        return resize_weight(weight, factor) - weight.repeat(1, 1, factor, factor) / factor**2
