"""Positions of patches of every size on a grid: one table for all sizes, and where in it each patch finds its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Positions", "coarse_rotation", "no_rotation"]


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions on G grids.

    Attributes:
        absolute: (1 + N, D) what is added to a token, 0 for prefix tokens first; None if the host adds nothing.
        rotary: (..., 1 + N, 2 R) rotary embeddings, none for prefix tokens first; None if the host does not rotate.
        place: (G, S, h, w) for each scale and top left cell of a patch its row in these tables.
    """

    absolute: Tensor | None
    rotary: Tensor | None
    place: Tensor

    @classmethod
    def of_scales(
        cls,
        tables: Sequence[tuple[Tensor | None, Tensor | None]],
        grid_size: tuple[int, int],
        device: torch.device,
    ) -> Positions:
        """On one grid.

        Args:
            tables: For each scale absolute positions and rotary embeddings of its complete patches, in raster order.
            grid_size: (h, w) in base patches.
            device: Of the images.
        """
        absolute = [one for one, _ in tables if one is not None]
        rotary = [one for _, one in tables if one is not None]
        return cls(
            torch.cat([torch.zeros_like(absolute[0][:1]), *absolute]) if absolute else None,
            torch.cat([no_rotation(rotary[0], 1), *rotary], dim=-2) if rotary else None,
            _places(grid_size, len(tables)).to(device, non_blocking=True)[None],
        )

    def tiled(self, rows: int, cols: int) -> Positions:
        """Those inside of windows, on a grid of so many windows."""
        return Positions(self.absolute, self.rotary, self.place.repeat(1, 1, rows, cols))

    @classmethod
    def joined(cls, parts: Sequence[Positions]) -> Positions:
        """Of grids of several sizes."""
        if len(parts) == 1:
            return parts[0]
        sides = [max(one.place.shape[dim] for one in parts) for dim in (2, 3)]
        places, start = [], 0
        for one in parts:
            height, width = one.place.shape[2:]
            places.append(F.pad(one.place + start, (0, sides[1] - width, 0, sides[0] - height)))
            table = one.rotary if one.absolute is None else one.absolute
            start += 0 if table is None else table.shape[-2]
        absolute = [one.absolute for one in parts if one.absolute is not None]
        rotary = [one.rotary for one in parts if one.rotary is not None]
        return cls(
            torch.cat(absolute) if absolute else None,
            torch.cat(rotary, dim=-2) if rotary else None,
            torch.cat(places),
        )


@lru_cache(maxsize=64)
def _places(grid_size: tuple[int, int], num_scales: int) -> Tensor:
    """(S, h, w), see `Positions`; of what is left of the grid at coarse scales nothing of use."""
    places, start = [], 1
    with torch.inference_mode(False):  # to be of use in training too
        for scale in range(num_scales):
            rows, cols = (side >> scale for side in grid_size)
            row, col = (torch.arange(side) >> scale for side in grid_size)
            places.append(start + row[:, None] * cols + col)
            start += rows * cols
        return torch.stack(places)


def no_rotation(rotation: Tensor, num_rows: int) -> Tensor:
    """Rows for prefix tokens, which are not rotated: sine 0, cosine 1."""
    still = rotation.new_zeros(*rotation.shape[:-2], num_rows, rotation.shape[-1])
    still[..., rotation.shape[-1] // 2 :] = 1
    return still


def coarse_rotation(rotation: Tensor, grid_size: tuple[int, int], factor: int) -> Tensor:
    """Rotary embedding at the centres of coarse patches, from the host's own embedding of the base grid.

    The angles are affine in the position, so those of a centre lie half-way between those of the four base patches
    around it, and the sum of four unit vectors at those angles points there. It holds for axial and mixed rotary
    embeddings of any library, as long as neighbouring patches are less than half a turn apart (for DINOv3: grids of
    five or more patches a side).

    Args:
        rotation: (..., h w, 2 R): sines, then cosines.
        grid_size: (h, w).
        factor: 2^i.

    Returns:
        (..., (h // factor) (w // factor), 2 R).
    """
    if factor == 1:
        return rotation
    rows, cols = grid_size[0] // factor, grid_size[1] // factor
    grid = rotation.float().unflatten(-2, grid_size)[..., : rows * factor, : cols * factor, :]
    cells = grid.unflatten(-2, (cols, factor)).unflatten(-4, (rows, factor))  # (..., rows, f, cols, f, 2 R)
    middle = slice(factor // 2 - 1, factor // 2 + 1)
    sin, cos = cells[..., :, middle, :, middle, :].sum((-4, -2)).chunk(2, dim=-1)
    length = torch.hypot(sin, cos).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.cat([sin / length, cos / length], dim=-1).flatten(-3, -2).to(rotation.dtype)
