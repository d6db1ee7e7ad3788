"""Window order of patch tokens, for attention inside windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_window", "from_windows", "in_windows", "window_seqlens"]


def check_window(window_size: int, num_scales: int, grid_size: tuple[int, int]) -> None:
    """Check that windows hold whole patches and fill the grid.

    Args:
        window_size: Side of a window in base patches.
        num_scales: Number of patch sizes.
        grid_size: (rows, columns) of base patches.

    Raises:
        ValueError: If a window does not hold the largest patch, or does not divide the grid.
    """
    largest, (height, width) = 2 ** (num_scales - 1), grid_size
    if window_size % largest:
        raise ValueError(
            f"a window of {window_size} base patches does not hold whole patches of {largest}: "
            f"use a multiple of {largest}"
        )
    if height % window_size or width % window_size:
        raise ValueError(
            f"a grid of {height}x{width} base patches is not made of whole windows of {window_size}: "
            f"pad the images to multiples of the window"
        )


def in_windows(cells: Tensor, window_size: int) -> Tensor:
    """Raster order of windows, then of positions inside each. (B, h, w) -> (B, h/win, w/win, win, win)"""
    return cells.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size)).transpose(2, 3)


def from_windows(index: Tensor, window_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 5) indices into the result of `in_windows` -> (n,) image, row and column."""
    image, window_row, window_col, row, col = index.unbind(1)
    return image, window_row * window_size + row, window_col * window_size + col


def window_seqlens(counts: Sequence[Sequence[int]], num_prefix_tokens: int) -> list[int]:
    """Tokens of each window, image after image; the prefix tokens of an image are a separate window.

    Args:
        counts: Patches in each window, for each image.
        num_prefix_tokens: Prefix tokens of each image.
    """
    return [length for image in counts for length in (num_prefix_tokens, *image) if length]


def count_in_windows(anchor: Tensor, window_size: int) -> Tensor:
    """Patches in each window. (B, h, w) bool -> (B, windows)"""
    return torch.sum(in_windows(anchor, window_size), (3, 4)).flatten(1)
