"""Rotary embeddings at the centres of patches of every size, from a host's own embedding of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RelativePositions", "centre_rotation", "rotations_of_scales"]

_FINE = 9  # odd, so that base patches lie at cells of the finer grid


class RelativePositions(NamedTuple):
    """Positions of a host that are relative to the image, so that angles depend on its number of patches.

    Attributes:
        offset: Position of the first of n patches, in n-ths of the image.
        fewest: Rows or columns from which on neighbouring patches are less than half a turn apart.
    """

    offset: float
    fewest: int


def rotations_of_scales(
    rotation_table: Callable[[tuple[int, int]], Any],
    grid_size: tuple[int, int],
    num_scales: int,
    relative: RelativePositions | None,
) -> list[Tensor]:
    """Rotary embeddings of the complete patches of each scale.

    Hosts whose positions are relative to the image turn by more the fewer patches it has. On few rows or columns their
    embedding of a finer grid over the same image is read, in which neighbours are less than half a turn apart.

    Args:
        rotation_table: (rows, columns) -> (..., n, 2 R) sines, then cosines of the host for the base patches of a grid.
        grid_size: (rows, columns) of base patches.
        num_scales: Number of patch sizes.
        relative: How positions depend on the image; None for hosts that count them in patches.

    Returns:
        For each scale (..., n, 2 R).
    """
    fine = 1 if relative is None or min(grid_size) >= relative.fewest else _FINE
    grid = (fine * grid_size[0], fine * grid_size[1])
    table: Tensor = rotation_table(grid)
    base, shift = table, 0
    if relative is not None and fine > 1:
        first, shift = (round((fine - 1) * part) for part in (relative.offset, 0.5 - relative.offset))
        base = table.unflatten(-2, grid)[..., first::fine, first::fine, :].flatten(-3, -2)
    return [base, *(centre_rotation(table, grid, fine << scale, shift) for scale in range(1, num_scales))]


def centre_rotation(rotation: Tensor, grid_size: tuple[int, int], factor: int, shift: int = 0) -> Tensor:
    """Rotary embedding at the centres of coarse patches, from the host's own embedding of a grid.

    The angles are affine in the position, so the angle at a centre is the mean of those of the four cells around it,
    and the sum of their four unit vectors has that angle. This holds for axial and mixed rotary embeddings, as long as
    neighbouring cells are less than half a turn apart.

    Args:
        rotation: (..., h w, 2 R) sines, then cosines.
        grid_size: (h, w) in cells.
        factor: Cells along a side of a coarse patch; even.
        shift: Cells by which the four cells lie before the middle of the patch, along both sides.

    Returns:
        (..., (h // factor) (w // factor), 2 R).
    """
    rows, cols = grid_size[0] // factor, grid_size[1] // factor
    grid = rotation.float().unflatten(-2, grid_size)[..., : rows * factor, : cols * factor, :]
    cells = grid.unflatten(-2, (cols, factor)).unflatten(-4, (rows, factor))  # (..., rows, f, cols, f, 2 R)
    middle = slice(factor // 2 - 1 - shift, factor // 2 + 1 - shift)
    sin, cos = cells[..., :, middle, :, middle, :].sum((-4, -2)).chunk(2, dim=-1)
    length = torch.hypot(sin, cos).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.cat([sin / length, cos / length], dim=-1).flatten(-3, -2).to(rotation.dtype)
