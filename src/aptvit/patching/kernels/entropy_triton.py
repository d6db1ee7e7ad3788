"""Entropy of all candidate patches of all scales in one kernel launch that reads each pixel once.

One program for each coarsest cell. It visits the finest cells inside along a Z-curve, so that after every 4^l of them a
cell of level l is complete: its histogram is a running sum, which is scored and then cleared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["entropy_maps"]

MIN_CHUNK = 256  # no fewer lanes than threads: replicated lanes would be counted more than once
MAX_CHUNK = 2048  # pixels in registers at a time


@triton.jit(do_not_specialize=["out_stride", "height", "width", "coarse_rows", "coarse_cols"])
def _entropy_kernel(  # type: ignore[no-untyped-def]
    out,  # (LEVELS, out_stride), row l starts with the (B, rows_l, cols_l) scores of level l
    images,  # (B, >= CHANNELS, height, width)
    out_stride,
    height,
    width,
    coarse_rows,
    coarse_cols,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    weight_0,
    weight_1,
    weight_2,
    offset,
    step,
    last,
    SIDE: tl.constexpr,  # of a finest cell, in pixels
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,  # LEVELS and BINS are padded to powers of two
    BINS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    SPAN: tl.constexpr = 1 << (LEVELS - 1)  # finest cells along a coarsest one
    AREA: tl.constexpr = SIDE * SIDE
    PADDING: tl.constexpr = (AREA + CHUNK - 1) // CHUNK * CHUNK - AREA
    program = tl.program_id(0)
    image = program // (coarse_rows * coarse_cols)
    first_y = program // coarse_cols % coarse_rows * SPAN
    first_x = program % coarse_cols * SPAN
    origin = images + image.to(tl.int64) * stride_b

    lane = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    level = tl.arange(0, ROWS)
    side = SIDE << level
    rows = height // side
    cols = width // side
    pixels = (side * side).to(tl.float32)
    slot = out + level.to(tl.int64) * out_stride + image.to(tl.int64) * rows * cols

    counts = tl.full([ROWS, BINS], 0, tl.int32)
    for i in range(SPAN * SPAN):
        y = first_y
        x = first_x
        for bit in tl.static_range(LEVELS - 1):
            x += ((i >> (2 * bit)) & 1) << bit
            y += ((i >> (2 * bit + 1)) & 1) << bit
        # A cell that reaches over the edge is not read. It counts as black; cells that contain it are not stored.
        whole = ((y + 1) * SIDE <= height) & ((x + 1) * SIDE <= width)
        area = tl.where(whole, AREA, 0)
        cell = origin + (y.to(tl.int64) * SIDE) * stride_h + (x.to(tl.int64) * SIDE) * stride_w
        for start in range(0, AREA, CHUNK):
            number = start + lane
            inside = number < area
            pixel = cell + (number // SIDE) * stride_h + (number % SIDE) * stride_w
            gray = tl.load(pixel, mask=inside, other=0).to(tl.float32) * weight_0
            if CHANNELS == 3:
                pixel += stride_c
                gray += tl.load(pixel, mask=inside, other=0).to(tl.float32) * weight_1
                pixel += stride_c
                gray += tl.load(pixel, mask=inside, other=0).to(tl.float32) * weight_2
            # clamped before the cast, which is undefined for numbers that no integer holds; NaN is no number above 0
            scaled = (gray + offset) * step
            value = tl.minimum(tl.where(scaled > 0.0, scaled, 0.0), last).to(tl.int32)
            counts += tl.histogram(tl.where(inside, value, 0), BINS)[None, :]
        counts -= tl.where(bins == 0, PADDING, 0)[None, :]  # lanes without a pixel fell into bin 0

        # H = (n log2 n - sum_v c_v log2 c_v) / n
        c = counts.to(tl.float32)
        surprise = pixels * tl.log2(pixels) - tl.sum(c * tl.log2(tl.maximum(c, 1.0)), axis=1)
        complete = ((i + 1) & ((1 << (2 * level)) - 1)) == 0
        row = y >> level
        col = x >> level
        stored = complete & (level < LEVELS) & (row < rows) & (col < cols)
        tl.store(slot + row * cols + col, tl.maximum(surprise / pixels, 0.0), mask=stored)
        counts = tl.where(complete[:, None], 0, counts)


def entropy_maps(
    images: Tensor,
    weights: Sequence[float],
    offset: float,
    step: float,
    patch_size: int,
    factors: Sequence[int],
    bins: int,
) -> dict[int, Tensor]:
    """Entropy of the gray values of every patch. Does not wait for the device.

    The gray value of a pixel is S = ((w_0 x_0 + w_1 x_1) + w_2 x_2) + offset in float32, without fused operations; its
    bin is int(S step), clamped to [0, bins - 1].

    Args:
        images: (B, C, H, W) uint8 or floats on a CUDA device, any strides.
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
    side, span = finest * patch_size, coarsest // finest
    levels = span.bit_length()
    cells = batch * (height // side) * (width // side)
    out = torch.empty(levels, cells, dtype=torch.float32, device=images.device)
    if cells:
        coarse_rows, coarse_cols = triton.cdiv(height // side, span), triton.cdiv(width // side, span)
        images = images.detach()
        with torch.cuda.device_of(images):
            _entropy_kernel[(batch * coarse_rows * coarse_cols,)](
                out,
                images,
                cells,
                height,
                width,
                coarse_rows,
                coarse_cols,
                *images.stride(),
                *(float(w) for w in (*weights, 0.0, 0.0)[:3]),
                float(offset),
                float(step),
                float(bins - 1),
                SIDE=side,
                LEVELS=levels,
                ROWS=triton.next_power_of_2(levels),
                BINS=max(triton.next_power_of_2(bins), 32),
                CHANNELS=len(weights),
                CHUNK=min(max(triton.next_power_of_2(side * side), MIN_CHUNK), MAX_CHUNK),
                num_warps=4,
                enable_fp_fusion=False,  # the bins must be those of the CPU
            )
    maps = {}
    for factor in factors:
        rows, cols = height // (factor * patch_size), width // (factor * patch_size)
        row = out[(factor // finest).bit_length() - 1]
        maps[factor] = row[: batch * rows * cols].view(batch, rows, cols)
    return maps
