"""Attention over maps with windows, padding and decomposed relative positions, as in SAM and VitDet, on kept tokens.

Such hosts cut the map of a layer into windows, filled up with zeros that attend, and add to the logit of a query q and
a key the products of q with an embedding of their distance in rows, and of that in columns. Here the tokens of each
window that are kept, and its padding, are a sequence; positions are those of the first cell of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.full_grid import GridPlan, GridTokens

__all__ = ["MapTokens", "MapWindows", "pooled"]


class MapTokens(GridTokens):
    """Kept tokens of maps, which become maps when something reads their values.

    Attributes:
        arrange: (R, N, D) -> the host's map.
    """

    arrange: Callable[[Tensor], Tensor]

    @staticmethod
    def __new__(
        cls, packed: Tensor, plan: GridPlan, shape: tuple[int, ...], arrange: Callable[[Tensor], Tensor]
    ) -> MapTokens:
        tokens = Tensor._make_wrapper_subclass(cls, shape, dtype=packed.dtype, device=packed.device)
        tokens.packed, tokens.plan, tokens.arrange, tokens._restored = packed, plan, arrange, None
        return tokens

    def restored(self) -> Tensor:
        """The map, a plain tensor."""
        if self._restored is None:
            self._restored = self.arrange(self.plan.restore(self.packed))
        return self._restored


def pooled(plan: GridPlan, rows: Tensor) -> Tensor:
    """The kept tokens of full grids, as means over the cells that each stands for. (R, N, D) -> (1, T, D)"""
    sums = rows.new_zeros(len(plan.index), rows.shape[-1]).index_add(0, plan.source, rows.flatten(0, 1))
    counts = torch.bincount(plan.source, minlength=len(plan.index))
    return (sums / counts[:, None].to(sums.dtype))[None]


@dataclass(frozen=True, eq=False)
class MapWindows:
    """Which kept tokens of maps attend to each other.

    Attributes:
        index: (G, L) kept token at each place of each window; T for padding, which attends.
        valid: (G, L) whether there is a token or padding at the place.
        row: (G, L) row in the window.
        col: (G, L) column in the window.
        size: (rows, columns) of a window.
    """

    index: Tensor
    valid: Tensor
    row: Tensor
    col: Tensor
    size: tuple[int, int]

    @classmethod
    def of_plan(cls, plan: GridPlan, grid_size: tuple[int, int], window: int) -> MapWindows:
        """The windows of a plan. Synchronises with the device once.

        Args:
            plan: The kept tokens of maps.
            grid_size: (h, w) of the maps.
            window: Side of a window in base patches; 0 for the whole image.
        """
        (height, width), kept, device = grid_size, len(plan.index), plan.index.device
        size = (window, window) if window else grid_size
        padded = tuple(-(-side // step) * step for side, step in zip(grid_size, size, strict=True))
        cells = torch.arange(padded[0] * padded[1], device=device)
        cells = cells[(cells // padded[1] >= height) | (cells % padded[1] >= width)]  # of the padding
        images = torch.arange(plan.shape[0], device=device).repeat_interleave(len(cells))
        image = torch.cat([plan.index // plan.shape[1], images])
        row = torch.cat([plan.index % plan.shape[1] // width, (cells // padded[1]).repeat(plan.shape[0])])
        col = torch.cat([plan.index % width, (cells % padded[1]).repeat(plan.shape[0])])
        down, across = padded[0] // size[0], padded[1] // size[1]
        group = (image * down + row // size[0]) * across + col // size[1]
        order = group.argsort(stable=True)
        counts = torch.bincount(group, minlength=plan.shape[0] * down * across)
        place = torch.arange(len(order), device=device) - (counts.cumsum(0) - counts)[group[order]]
        table = torch.full((4, len(counts), int(counts.max())), 0, device=device)
        token = torch.cat([torch.arange(kept, device=device), torch.full_like(images, kept)])
        for values, target in zip((token, torch.ones_like(token), row % size[0], col % size[1]), table, strict=True):
            target[group[order], place] = values[order]
        return cls(table[0], table[1].bool(), table[2], table[3], size)

    def attend(
        self, qkv: Tensor, scale: float, tables: tuple[Tensor, Tensor] | None, key_bias: Tensor | None = None
    ) -> Tensor:
        """Attention inside of each window.

        Args:
            qkv: (T + 1, 3, H, d) queries, keys and values of the kept tokens, and of padding.
            scale: Factor of the products of queries and keys.
            tables: (rows, rows, d) and (columns, columns, d) embeddings of the distance of a query and a key; None
                without.
            key_bias: (T,) added to the logits of each token as a key.

        Returns:
            (T, H d).
        """
        query, key, value = qkv[self.index].permute(2, 0, 3, 1, 4)  # (G, H, L, d) each
        bias = torch.zeros(self.valid.shape, dtype=query.dtype, device=query.device)
        if key_bias is not None:
            bias = F.pad(key_bias, (0, 1)).to(bias.dtype)[self.index]
        bias = bias.masked_fill(~self.valid, float("-inf"))[:, None, None]  # (G, 1, 1, L)
        if tables is not None:
            for table, place in zip(tables, (self.row, self.col), strict=True):
                products = torch.einsum("ghld,glkd->ghlk", query, table[place])
                bias = bias + products.gather(3, place[:, None, None].expand(*products.shape[:3], -1))
        else:
            bias = bias.expand(-1, 1, query.shape[2], -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        result: Any = qkv.new_zeros(len(qkv), *out.shape[1::2])  # (T + 1, H, d)
        return result.index_put((self.index[self.valid],), out.transpose(1, 2)[self.valid])[:-1].flatten(1)
