"""How far would a big patch land from the tokens it stands for? Measured in the model's own embedding space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EmbeddingScorer", "mean_of_parts", "normalised", "reduced"]


class EmbeddingScorer:
    """Squared distance of a coarse patch's embedding from the mean of its base patches' embeddings.

        score(P) = || E(resize(P)) - mean_j E(P_j) ||^2 = || W (resize(P) - mean_j P_j) ||^2

    The patch embedding is linear, so the difference is taken between pixels and embedded once: a quarter of the host's
    patch embedding for patches of twice the size. Host weights are read, none are added.

    Args:
        patch_weight: Gives the (D, C, p, p) weight, and the bias, of the host's patch embedding as they are now.
    """

    name = "embedding"

    def __init__(self, patch_weight: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        self._patch_weight = patch_weight

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.scoring.Scorer`, of pixels that the host would read as they are."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.scoring.ImageScorer`."""
        images = normalised(images, mean, std)
        weight = self._patch_weight()[0].detach().float()
        maps = {}
        for factor in factors:
            side = factor * patch_size
            rows, cols = images.shape[2] // side, images.shape[3] // side
            if rows * cols == 0:  # too small for such a patch, and for a convolution
                maps[factor] = images.new_zeros(len(images), rows, cols)
                continue
            whole = images[:, :, : rows * side, : cols * side]
            difference = reduced(whole, factor) - mean_of_parts(whole, factor, patch_size)
            moved = F.conv2d(difference, weight, stride=patch_size)  # (B, D, h, w)
            maps[factor] = moved.square().sum(1)
        return maps


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images as the host reads them, float32: raw uint8 pixels normalised, floats as they are."""
    if images.dtype != torch.uint8:
        return images.float()
    shift, scale = torch.tensor([mean, std])[:, None, :, None, None].to(images.device, non_blocking=True)
    return (images.float() / 255 - shift) / scale


def reduced(images: Tensor, factor: int) -> Tensor:
    """Bilinear reduction without antialiasing, as `aptvit.embedding.resize_weight` has it: the mean of the central 2x2
    pixels of each block. (B, C, H, W) -> (B, C, H / factor, W / factor)
    """
    if factor == 2:
        return F.avg_pool2d(images, 2)
    blocks = images.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    return blocks[:, :, :, middle, :, middle].mean((3, 5))


def mean_of_parts(images: Tensor, factor: int, patch_size: int) -> Tensor:
    """The mean of the base patches of each coarse patch. (B, C, H, W) -> (B, C, H / factor, W / factor)"""
    # (B, C, h, f, p, w, f, p) -> (B, C, h, p, w, p)
    parts = images.unflatten(3, (-1, factor, patch_size)).unflatten(2, (-1, factor, patch_size))
    return parts.mean((3, 6)).flatten(4, 5).flatten(2, 3)
