"""What several test files draw from, and compare with."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from aptvit.patching.layout import PatchLayout

Scores = dict[int, Tensor]


@st.composite
def scored_grids(draw: st.DrawFn, max_scales: int = 4) -> tuple[tuple[int, int], int, int, Scores]:
    """(rows, columns), scales, images, scores; few distinct scores, so that ties happen."""
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    num_scales = draw(st.integers(1, max_scales))
    batch = draw(st.integers(1, 3))
    levels = draw(st.sampled_from([2, 5, 1000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = {
        2**i: torch.from_numpy(random.integers(0, levels, (batch, grid[0] >> i, grid[1] >> i)).astype(np.float32))
        for i in range(1, num_scales)
    }
    return grid, num_scales, batch, scores


def threshold_lists(levels: int = 1000) -> st.SearchStrategy[list[float]]:
    return st.lists(st.integers(-1, 6).map(float), min_size=4, max_size=4)


def assert_same_layout(got: PatchLayout, expected: PatchLayout) -> None:
    assert (got.patch_size, got.num_prefix_tokens) == (expected.patch_size, expected.num_prefix_tokens)
    assert got.grid_sizes == expected.grid_sizes
    assert got.counts == expected.counts
    assert got.seqlens == expected.seqlens
    assert got.packing.lengths_cpu.tolist() == [*expected.seqlens, max(expected.seqlens)]
    for name in ("scale_map", "image", "scale", "row", "col", "cu_seqlens", "patch_index", "restore_index"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.dtype == other.dtype and torch.equal(one, other), name
