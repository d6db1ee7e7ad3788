"""Two passes through the blocks: all of an image coarsely, then finely where that tells, beside what is known already.

What the first pass says decides which patches the second one reads finely (`aptvit.scorers.preview`). Its tokens are not
computed twice: those of patches that stay coarse are what the first pass made of them, in every block, and in the
second pass fine patches and prefix tokens attend to the keys and values that it left.

first pass    all 2x patches        A B C D    each block attends to  A B C D
layout        A B stay coarse, C and D are read finely
second pass   fine patches alone    c c c c d d d d    attends to  A B c c c c d d d d

With nothing coarse the second pass is the host alone, and with nothing fine the first one is the model that merges
everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aptvit.encoder.block_input import Beside, Known, Runs
from aptvit.layers.attention import Backend, packed, packed_attention, run_inside
from aptvit.patching.layout import Packing, PatchLayout

__all__ = ["SecondPass", "run_and_leave", "run_beside"]


class SecondPass:
    """Who goes through the blocks again, and beside whom.

    Args:
        layout: Of the images, with a first pass.

    Attributes:
        rows: (R,) tokens of the layout that do: prefix tokens and fine patches.
        runs: Theirs, one for each image and one for each window, those without fine patches too.
        source: (T,) for each token of the layout its place in [the tokens of the first pass, those rows].
    """

    def __init__(self, layout: PatchLayout) -> None:
        first = layout.first_pass
        assert first is not None
        prefix, device = layout.num_prefix_tokens, layout.image.device
        self.first = first
        self.num_rows = layout.num_tokens - sum(sum(coarse) for _, *coarse in layout.counts)
        again = torch.ones(layout.num_tokens, dtype=torch.bool, device=device)
        again[layout.patch_index] = layout.scale == 0
        self.rows = torch.nonzero_static(again, size=self.num_rows)[:, 0]
        known = layout.restore_index.new_zeros(layout.num_tokens)
        # Images too small for a first pass may be wider than all that had one; nothing of theirs is known.
        row, col = layout.row.clamp(max=first.position.shape[1] - 1), layout.col.clamp(max=first.position.shape[2] - 1)
        known[layout.patch_index] = first.position[layout.image, row, col]
        self.source = torch.where(again, again.cumsum(0) - 1 + first.num_tokens, known)
        images, windows = Packing.from_seqlens([prefix + fine for fine, *_ in layout.counts], device), None
        if layout.window_packing is not None:
            assert first.window_size is not None
            windows = Packing.from_seqlens(_fine_in_windows(layout, first.window_size**2), device)
        self.runs = Runs(images, windows)

    def known(self, runs: Runs) -> Known:
        """What the rows attend to.

        Args:
            runs: Of all tokens of the layout.
        """
        return Known(runs, self.source, [block.keys_values for block in self.first.blocks])

    def complete(self, x: Tensor, block: int) -> Tensor:
        """What a block gives of all tokens of the layout. (1, R, D) -> (1, T, D)"""
        return torch.cat([self.first.blocks[block].out.to(x.dtype), x], dim=1).index_select(1, self.source)


class _Leaving(packed):
    """Leaves the keys and values of every attention."""

    def __init__(self, packing: Packing, backend: Backend | None, images: Packing | None) -> None:
        super().__init__(packing, backend, images)
        self.keys_values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        if self.caught == 1:
            self.keys_values = []
        self.keys_values += [key, value]
        return super().attend(query, key, value, scale, dropout_p)


class _Beside(packed):
    """Rows attend to those of the first pass too."""

    def __init__(self, beside: Beside, packing: Packing, backend: Backend | None, images: Packing | None) -> None:
        super().__init__(packing, backend, images)
        self.beside = beside

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        keys, source, left = self.beside.keys, self.beside.source, self.beside.keys_values[self.caught - 1]
        own = zip(left, (key, value), strict=True)
        key, value = (torch.cat([first.to(its.dtype), its], dim=2).index_select(2, source) for first, its in own)
        return packed_attention(query, key, value, self.packing, scale, dropout_p, self.backend, keys)


def run_and_leave(
    block: nn.Module,
    x: Tensor,
    arguments: dict[str, Any],
    packing: Packing | None,
    backend: Backend | None,
    images: Packing | None,
) -> list[Tensor]:
    """A block in the first pass. Arguments as for `aptvit.layers.attention.run_block`, of a packed sequence.

    Returns:
        Its output, and keys and values of each attention in it.
    """
    assert packing is not None
    mode = _Leaving(packing, backend, images)
    out = run_inside(mode, block, x, arguments)
    return [out, *mode.keys_values]


def run_beside(
    block: nn.Module,
    x: Tensor,
    arguments: dict[str, Any],
    packing: Packing,
    backend: Backend | None,
    images: Packing | None,
    beside: Beside,
) -> Tensor:
    """A block in the second pass, on (1, R, D) rows. Other arguments as for `aptvit.layers.attention.run_block`."""
    return run_inside(_Beside(beside, packing, backend, images), block, x, arguments)


def _fine_in_windows(layout: PatchLayout, cells: int) -> list[int]:
    """Fine patches in each window of so many cells; prefix tokens of an image are a window of their own."""
    assert layout.window_packing is not None
    lengths, fine = iter(layout.window_packing.seqlens), []
    for rows, cols in layout.grid_sizes:
        fine += [next(lengths)] if layout.num_prefix_tokens else []
        fine += [(4 * next(lengths) - cells) // 3 for _ in range(rows * cols // cells)]  # of n + (cells - n) / 4
    return fine
