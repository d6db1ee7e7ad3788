"""Entropy of all candidate patches of all scales on the CPU, in one pass over the pixels with little extra memory."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["entropy_maps"]

# (images, weights, offset, step, side, bins, table, out) -> None
Kernel = Callable[..., None]

_thread_lock = threading.Lock()  # not all of numba's threading layers may be entered from several threads


@functools.cache
def _kernel(*, parallel: bool) -> Kernel:
    """The compiled loop, for several threads or for one; the latter does not start numba's thread pool."""
    import numba

    zero = np.float32(0)

    def entropies(
        images: Any,  # (B, >= channels, H, W)
        weights: Any,  # (channels,) float32
        offset: Any,  # float32
        step: Any,  # float32
        side: int,  # of a finest cell, in pixels
        bins: int,
        table: Any,  # (pixels of a coarsest cell + 1,) c log2 c
        out: Any,  # (levels, ...), row l starts with the (B, rows_l, cols_l) scores of level l
    ) -> None:
        batch, _, height, width = images.shape
        levels, channels = len(out), len(weights)
        span = 1 << (levels - 1)  # finest cells along a coarsest one
        rows, cols = height // side, width // side
        coarse_rows, coarse_cols = (rows + span - 1) // span, (cols + span - 1) // span
        last = np.float32(bins - 1)
        for strip in numba.prange(batch * coarse_rows):
            b, first_y = strip // coarse_rows, strip % coarse_rows * span
            counts = np.zeros((levels, bins), np.int32)
            gray, bin_of = np.empty(side, np.float32), np.empty(side, np.uint32)
            for i in range(coarse_cols * span * span):
                # The finest cells of a coarsest one along a Z-curve: after every 4^l, a cell of level l is complete.
                y, x = first_y, i // (span * span) * span
                for bit in range(levels - 1):
                    x += ((i >> (2 * bit)) & 1) << bit
                    y += ((i >> (2 * bit + 1)) & 1) << bit
                if y < rows and x < cols:
                    for line in range(y * side, (y + 1) * side):
                        run = images[b, :, line, x * side : (x + 1) * side]
                        for k in range(side):
                            gray[k] = np.float32(run[0, k]) * weights[0]
                        for channel in range(1, channels):
                            for k in range(side):
                                gray[k] += np.float32(run[channel, k]) * weights[channel]
                        for k in range(side):
                            value = (gray[k] + offset) * step
                            # NaN goes to bin 0; clamped before the cast, which is undefined outside the integers
                            bin_of[k] = np.int32(min(value, last) if value > zero else zero)
                        for k in range(side):
                            counts[0, bin_of[k]] += 1
                for level in range(levels):
                    area = side * side << (2 * level)
                    level_rows, level_cols = height // (side << level), width // (side << level)
                    row, col = y >> level, x >> level
                    if row < level_rows and col < level_cols:
                        total = 0.0
                        for v in range(bins):
                            total += table[counts[level, v]]
                        entropy = (table[area] - total) / area
                        out[level, (b * level_rows + row) * level_cols + col] = max(entropy, 0.0)
                    if level + 1 < levels:
                        for v in range(bins):
                            counts[level + 1, v] += counts[level, v]
                    for v in range(bins):
                        counts[level, v] = 0
                    if (i + 1) % (1 << (2 * level + 2)):
                        break

    if parallel:
        entropies.__qualname__ += "_parallel"  # names a file of numba's cache, which ignores options
    try:
        return numba.njit(parallel=parallel, cache=True, nogil=True)(entropies)
    except RuntimeError:  # no writable folder for numba's cache
        return numba.njit(parallel=parallel, nogil=True)(entropies)


@functools.cache
def _owner_pid() -> int:
    """The process that owns numba's threads. A fork has no threads, and some threading layers abort it on use."""
    return os.getpid()


@functools.lru_cache(maxsize=8)
def _table(pixels: int) -> np.ndarray:
    """(pixels + 1,) c log2 c of each count c."""
    counts = np.arange(pixels + 1, dtype=np.float64)
    return counts * np.log2(np.maximum(counts, 1))


def entropy_maps(
    images: Tensor,
    weights: Sequence[float],
    offset: float,
    step: float,
    patch_size: int,
    factors: Sequence[int],
    bins: int,
) -> dict[int, Tensor]:
    """Entropy of the gray values of every patch, on no more threads than torch uses.

    The gray value of a pixel is S = ((w_0 x_0 + w_1 x_1) + w_2 x_2) + offset in float32, without fused operations; its
    bin is int(S step), clamped to [0, bins - 1].

    Args:
        images: (B, C, H, W) uint8 or floats on the CPU, any strides.
        weights: Weights of the first channels, one or three; further channels are not read.
        offset: Added to the weighted sum.
        step: Bins per gray value.
        patch_size: Side of a base patch in pixels.
        factors: Sizes to score, in base patches: powers of two.
        bins: Number of bins.

    Returns:
        For each factor f, (B, H // (f p), W // (f p)) float32 entropy in bits of the patches wholly inside the image.
    """
    if not factors:
        return {}
    finest, coarsest = min(factors), max(factors)
    batch, _, height, width = images.shape
    side, levels = finest * patch_size, (coarsest // finest).bit_length()
    out = torch.empty(levels, batch * (height // side) * (width // side), dtype=torch.float32)
    if out.numel():
        pixels = images.detach()[:, : len(weights)]
        if pixels.dtype not in (torch.uint8, torch.float32):
            pixels = pixels.float()
        _run(
            pixels.numpy(),
            np.array(weights, np.float32),
            np.float32(offset),
            np.float32(step),
            side,
            bins,
            _table((coarsest * patch_size) ** 2),
            out.numpy(),
        )
    maps = {}
    for factor in factors:
        rows, cols = height // (factor * patch_size), width // (factor * patch_size)
        row = out[(factor // finest).bit_length() - 1]
        maps[factor] = row[: batch * rows * cols].view(batch, rows, cols)
    return maps


def _run(*args: Any) -> None:
    threads = torch.get_num_threads()
    if threads == 1 or _owner_pid() != os.getpid():
        return _kernel(parallel=False)(*args)
    import numba

    with _thread_lock:
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, before))
        try:
            _kernel(parallel=True)(*args)
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != threads:  # numba and torch may share the settings of one OpenMP
                torch.set_num_threads(threads)
