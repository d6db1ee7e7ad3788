"""Positions of patches of every size: one table for all sizes and grids, and the row of each patch in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PositionTable", "Rotation"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """Rotary embeddings of the tokens of a packed sequence.

    Attributes:
        globally: (..., T, 2 R) sines and cosines of positions in the image.
        in_windows: The same of positions in the window, for blocks that attend inside it; None without windows.
    """

    globally: Tensor
    in_windows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PositionTable:
    """Positions of all patches on G grids.

    Attributes:
        absolute: (1 + N, D) absolute positions; the first row is 0, for prefix tokens. None if the host has none.
        rotary: (..., 1 + N, 2 R) rotary embeddings; the first row does not rotate. None if the host has none.
        places: (S G, 2) for each scale and grid, the table row of its first patch, and its patches per grid row.
        tiled: Whether the grids are square windows that tile an image.
    """

    absolute: Tensor | None
    rotary: Tensor | None
    places: Tensor
    tiled: bool = False

    @classmethod
    def of_grids(
        cls,
        tables: Sequence[Sequence[tuple[Tensor | None, Tensor | None]]],
        grid_sizes: Sequence[tuple[int, int]],
        device: torch.device,
        tiled: bool = False,
    ) -> PositionTable:
        """Join the positions of several grids.

        Args:
            tables: For each grid and scale, (n, D) absolute positions and (..., n, 2 R) rotary embeddings of its
                complete patches, in raster order; None for kinds that the host does not have.
            grid_sizes: (h, w) of each grid, in base patches.
            device: Device of the tokens.
            tiled: As for the class.
        """
        by_scale = [table for scale_tables in zip(*tables, strict=True) for table in scale_tables]
        absolute_tables = [absolute for absolute, _ in by_scale if absolute is not None]
        rotary_tables = [rotary for _, rotary in by_scale if rotary is not None]
        grids = [(h >> scale, w >> scale) for scale in range(len(tables[0])) for h, w in grid_sizes]
        sizes = torch.tensor([[rows * cols, cols] for rows, cols in grids])
        starts = 1 + sizes[:, 0].cumsum(0) - sizes[:, 0]
        return cls(
            torch.cat([torch.zeros_like(absolute_tables[0][:1]), *absolute_tables]) if absolute_tables else None,
            torch.cat([no_rotation(rotary_tables[0]), *rotary_tables], dim=-2) if rotary_tables else None,
            torch.stack([starts, sizes[:, 1]], dim=1).to(device, non_blocking=True),
            tiled,
        )

    def rows(self, key: Tensor, cells: Tensor) -> Tensor:
        """(n,) table row of each patch.

        Args:
            key: (n,) scale * G + grid of each patch.
            cells: (2, n) grid row and column of each patch, in patches of its scale.
        """
        start, columns = self.places.index_select(0, key).unbind(1)
        row, col = cells % columns if self.tiled else cells
        return torch.addcmul(start + col, row, columns)


def no_rotation(rotation: Tensor) -> Tensor:
    """One row for tokens that are not rotated: sine 0, cosine 1. (..., n, 2 R) -> (..., 1, 2 R)"""
    row = rotation.new_zeros(*rotation.shape[:-2], 1, rotation.shape[-1])
    row[..., rotation.shape[-1] // 2 :] = 1
    return row
