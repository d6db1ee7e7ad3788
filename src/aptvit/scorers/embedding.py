"""How far would a big patch land from the tokens it stands for? Measured in the model's own embedding space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.layers.patch_embed import ParameterCache, resize_weight

__all__ = ["EmbeddingScorer"]


class EmbeddingScorer:
    """Squared distance of a coarse patch's embedding from the mean of its base patches' embeddings.

        score(P) = || E(resize(P)) - mean_j E(P_j) ||^2

    Both are linear in the pixels, so a scale is one convolution. A fixed random projection to ``dims`` dimensions,
    which keeps distances on average, makes it cheap for small models too. Host weights are read, none are added.

    Args:
        patch_weight: Gives the (D, C, p, p) weight, and the bias, of the host's patch embedding as they are now.
        dims: Dimensions to measure in; None for all.
    """

    name = "embedding"

    def __init__(self, patch_weight: Callable[[], tuple[Tensor, Tensor | None]], dims: int | None = 64) -> None:
        self._patch_weight = patch_weight
        self._dims = dims
        self._cache = ParameterCache()

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.Scorer`, of pixels that the host would read as they are."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.ImageScorer`."""
        if images.dtype == torch.uint8:
            shift, scale = torch.tensor([mean, std])[:, None, :, None, None].to(images.device, non_blocking=True)
            images = (images.float() / 255 - shift) / scale
        weight, _ = self._patch_weight()
        maps = {}
        for factor in factors:
            difference = self._cache.get(factor, [weight], partial(self._difference, weight, factor))
            rows, cols = (side // (factor * patch_size) for side in images.shape[2:])
            if rows * cols == 0:  # too small for such a patch, and for a convolution
                maps[factor] = images.new_zeros(len(images), rows, cols, dtype=torch.float32)
                continue
            moved = F.conv2d(images.float(), difference, stride=factor * patch_size)  # (B, dims, h, w)
            maps[factor] = moved.square().sum(1)
        return maps

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.patching.scoring.CountedScorer`: each size is a convolution over all pixels."""
        weight, _ = self._patch_weight()
        per_patch = 2.0 * min(self._dims or len(weight), len(weight)) * weight[0].numel() * len(factors)
        return lambda num_patches: per_patch * num_patches

    def _difference(self, weight: Tensor, factor: int) -> Tensor:
        """What the coarse embedding sees other than the mean of the fine ones. -> (dims, C, f p, f p)"""
        weight = weight.detach().float()
        difference = resize_weight(weight, factor) - weight.repeat(1, 1, factor, factor) / factor**2
        full = len(weight)
        if self._dims is None or self._dims >= full:
            return difference
        # Orthonormal, the same for every model of this width, wherever it runs.
        random = torch.randn(full, self._dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        projection = torch.linalg.qr(random).Q.T.to(weight) * (full / self._dims) ** 0.5
        return torch.einsum("kd,dchw->kchw", projection, difference)
