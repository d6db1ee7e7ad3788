"""Cutting patches out of images, with normalisation and cast in the same kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather_patches"]

MAX_CHUNK = 1024  # pixels of a program


@triton.jit(do_not_specialize=["channels"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    out,  # (n, channels, SIDE, SIDE)
    images,  # (b, channels, H, W)
    image,  # (n,)
    row,  # (n,)
    col,  # (n,)
    statistics,  # (2, channels) mean and standard deviation
    channels,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    SIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    AREA: tl.constexpr = SIDE * SIDE
    program = tl.program_id(0)
    patch = program // channels
    channel = program % channels
    number = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = number < AREA
    source = images + tl.load(image + patch).to(tl.int64) * stride_b + channel.to(tl.int64) * stride_c
    source += tl.load(row + patch).to(tl.int64) * SIDE * stride_h
    source += tl.load(col + patch).to(tl.int64) * SIDE * stride_w
    value = tl.load(source + (number // SIDE) * stride_h + (number % SIDE) * stride_w, mask=inside, other=0)
    if NORMALISE:
        mean = tl.load(statistics + channel)
        std = tl.load(statistics + channels + channel)
        value = tl.div_rn(tl.div_rn(value.to(tl.float32), 255.0) - mean, std)
    tl.store(out + program.to(tl.int64) * AREA + number, value.to(out.dtype.element_ty), mask=inside)


def gather_patches(
    images: Tensor,
    image: Tensor,
    row: Tensor,
    col: Tensor,
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Cut patches out of images as a model reads them. Without gradients for the images.

    Args:
        images: (b, C, H, W) on a CUDA device, any strides: raw uint8 pixels, or floats, which are only cast.
        image: (n,) image of each patch.
        row: (n,) row of each patch, in patches of this size.
        col: (n,) column of each patch, in patches of this size.
        side: Side of a patch in pixels.
        mean: Mean of each channel of images in [0, 1]; used for uint8 only.
        std: Standard deviation of each channel; used for uint8 only.
        dtype: Type of the result; the normalisation is computed in float32.

    Returns:
        (n, C side^2) rows in the order of a convolution's weight.
    """
    channels, area = images.shape[1], side * side
    out = torch.empty(len(image), channels * area, dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    images = images.detach()
    raw = images.dtype == torch.uint8
    statistics = out  # not read
    if raw:
        statistics = torch.tensor([mean, std], dtype=torch.float32).to(images.device, non_blocking=True)
    chunk = min(triton.next_power_of_2(area), MAX_CHUNK)
    with torch.cuda.device_of(images):
        _gather_kernel[(len(image) * channels, triton.cdiv(area, chunk))](
            out,
            images,
            image.contiguous(),
            row.contiguous(),
            col.contiguous(),
            statistics,
            channels,
            *images.stride(),
            SIDE=side,
            CHUNK=chunk,
            NORMALISE=raw,
            num_warps=4,
            enable_fp_fusion=False,  # the same rounding as gather_torch
        )
    return out
