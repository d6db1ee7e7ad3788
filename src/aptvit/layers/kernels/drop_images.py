"""Stochastic depth of a packed sequence."""

from __future__ import annotations

from torch import Tensor

from aptvit.patching.layout import Packing

__all__ = ["drop_images"]


def drop_images(x: Tensor, p: float, images: Packing) -> Tensor:
    """Set all tokens of random images to zero, and divide the others by 1 - p. (1, T, D) -> (1, T, D)

    Args:
        x: (1, T, D) packed tokens.
        p: Probability that an image is dropped.
        images: The sequences of the images.
    """
    kept = x.new_empty(images.cu_seqlens.shape[0] - 1).bernoulli_(1 - p)
    if p < 1:
        kept = kept / (1 - p)
    return x * kept[images.sequence_of_token(x.shape[1])][None, :, None]
