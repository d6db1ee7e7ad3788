"""Cutting patches out of images in plain torch, the reference for the kernel in Triton."""

from __future__ import annotations

from torch import Tensor

__all__ = ["gather_patches"]


def gather_patches(images: Tensor, image: Tensor, row: Tensor, col: Tensor, side: int) -> Tensor:
    """Cut patches out of images.

    Args:
        images: (b, C, H, W).
        image: (n,) image of each patch.
        row: (n,) row of each patch, in patches of this size.
        col: (n,) column of each patch, in patches of this size.
        side: Side of a patch in pixels.

    Returns:
        (n, C side^2) rows in the order of a convolution's weight.
    """
    height, width = images.shape[2] // side, images.shape[3] // side
    whole = images[:, :, : height * side, : width * side]
    # (b, C, h, side, w, side) -> (b, h, w, C, side, side): a view; only the chosen patches are copied
    cells = whole.unflatten(3, (width, side)).unflatten(2, (height, side)).permute(0, 2, 4, 1, 3, 5)
    return cells[image, row, col].flatten(1)
