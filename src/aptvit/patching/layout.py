"""The patches of a batch of images, in the order of the packed sequence: the value that all later stages read.

scores {2: (B, h/2, w/2), 4: (B, h/4, w/4)}
   │  aptvit.patching.selection.choose_scales
   ▼
scale map (B, h, w): 0 where a base patch stays, i where a patch of 2^i x 2^i base patches covers the cell
   │  PatchLayout.from_scale_map
   ▼
PatchLayout: image, scale, row, col of each patch token, and the length of each image's sequence
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.patching.windows import check_window, count_in_windows, from_windows, in_windows, window_seqlens

__all__ = ["Packing", "PatchLayout"]


@dataclass(frozen=True, eq=False)
class Packing:
    """The sequences of a packed batch. A token attends only to tokens of its own sequence.

    Lengths are stored in three forms, so that none has to be copied between devices when it is read.

    Attributes:
        seqlens: Length of each sequence.
        cu_seqlens: (sequences + 1,) int32 offsets on the device of the tokens.
        max_seqlen: Upper bound of the lengths. Without sequences, the length of an image with nothing merged.
        lengths_cpu: (sequences + 1,) int64, the lengths and ``max_seqlen`` as a tensor on the CPU: an input of compiled
            graphs, so that a new set of lengths is new data and not a new graph.
        is_dense: Whether all sequences have the same length, so that they are a plain batch.
    """

    seqlens: list[int]
    cu_seqlens: Tensor
    max_seqlen: int
    lengths_cpu: Tensor
    is_dense: bool

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int], device: torch.device | str | None = None, empty: int = 0) -> Packing:
        """From the length of each sequence, ``empty`` if there are none; offsets are copied from CPU to the device."""
        offsets = torch.tensor([0, *itertools.accumulate(seqlens)], dtype=torch.int32)
        return cls.from_offsets(seqlens, offsets.to(device, non_blocking=True), max(seqlens, default=empty))

    @classmethod
    def from_offsets(cls, seqlens: Sequence[int], cu_seqlens: Tensor, max_seqlen: int) -> Packing:
        """From lengths and offsets that are on their device already."""
        return cls(list(seqlens), cu_seqlens, max_seqlen, torch.tensor([*seqlens, max_seqlen]), len(set(seqlens)) <= 1)

    @property
    def num_tokens(self) -> int:
        return sum(self.seqlens)

    def padded(self, num_tokens: int) -> Packing:
        """The packing with a sequence of ``num_tokens`` (0 or more) appended."""
        offsets = F.pad(self.cu_seqlens, (0, 1), value=self.num_tokens + num_tokens)
        return Packing.from_offsets([*self.seqlens, num_tokens], offsets, max(self.max_seqlen, num_tokens))

    def to_batch(self, tokens: Tensor) -> Tensor:
        """(..., T, D) -> (B, ..., L, D), where all sequences have the same length."""
        return tokens.unflatten(-2, (len(self.seqlens), max(self.seqlens, default=self.max_seqlen))).movedim(-3, 0)

    def sequence_of_token(self, num_tokens: int) -> Tensor:
        """(T,) number of the sequence that each token belongs to."""
        sequences = torch.arange(self.cu_seqlens.shape[0] - 1, device=self.cu_seqlens.device)
        return sequences.repeat_interleave(self.cu_seqlens.diff(), output_size=num_tokens)


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """The patches of a batch of images, packed into one sequence.

    Patch tokens are ordered by (image, window, position in raster order); without windows an image is one window.
    In the packed sequence, the tokens of each image start with its prefix tokens (class token, registers).

    Attributes:
        patch_size: Side of a base patch in pixels.
        num_scales: Scales that may occur.
        num_prefix_tokens: Prefix tokens of each image.
        grid_sizes: (rows, columns) of base patches, for each image.
        scale_map: (B, max rows, max columns) int8: scale of the patch that covers each base cell, -1 outside an image.
        image: (N,) image of each patch token.
        scale: (N,) scale of each patch token: its patch covers 2^scale x 2^scale base patches.
        row: (N,) top row of each patch, in base patches.
        col: (N,) left column of each patch, in base patches.
        counts: Patches of each scale, for each image.
        packing: The sequence of each image, prefix tokens included.
        window_size: Side of a window in base patches; None without windows.
        window_packing: The same tokens cut into windows, for attention that stays inside them; prefix tokens of an
            image, if there are any, are a window of their own. None without windows.
        cache: Results of the blocks from scoring, which the encoder reuses (`aptvit.encoder.cache.EncoderCache`); None
            from scorers that do not run the blocks.
    """

    patch_size: int
    num_scales: int
    num_prefix_tokens: int
    grid_sizes: list[tuple[int, int]]
    scale_map: Tensor
    image: Tensor
    scale: Tensor
    row: Tensor
    col: Tensor
    counts: list[list[int]]
    packing: Packing
    window_size: int | None = None
    window_packing: Packing | None = None
    cache: Any = None

    @classmethod
    def from_scale_map(
        cls,
        scale_map: Tensor,
        patch_size: int,
        num_scales: int,
        num_prefix_tokens: int = 0,
        grid_sizes: Sequence[tuple[int, int]] | None = None,
        window_size: int | None = None,
        finite: Tensor | None = None,
        counts: Sequence[Sequence[int]] | None = None,
        window_counts: Sequence[Sequence[int]] | None = None,
    ) -> PatchLayout:
        """List the patches of a scale map. Synchronises with the device once, to read the number of patches.

        Args:
            scale_map: (B, rows, columns) scale of the patch over each base cell, -1 outside an image. A patch of
                scale i starts at multiples of 2^i and fills its whole cell.
            patch_size: Side of a base patch in pixels.
            num_scales: Scales that may occur in the map.
            num_prefix_tokens: Prefix tokens of each image.
            grid_sizes: Base grid of each image; the whole map where it is not given.
            window_size: Side of a window in base patches; rows and columns of the map must be multiples of it.
            finite: (B,) 1 for images of finite pixels, 0 for others, -1 for NaN scores; read along with the counts.
            counts: Patches of each scale, for each image; computed, with the synchronisation, if not given.
            window_counts: Patches in each window, for each image; likewise.

        Raises:
            ValueError: If a window does not hold the largest patch or does not divide the map, or an image or its
                scores are not finite.
        """
        num_images, height, width = scale_map.shape
        # A patch is listed by its top left cell. The scale of cells outside of images, -1, is 255 as uint8.
        coarsest = _coarsest_starting(height, width).to(scale_map.device, non_blocking=True)
        anchor = scale_map.to(torch.int8).view(torch.uint8) <= coarsest
        if window_size is not None:
            check_window(window_size, num_scales, (height, width))
        if counts is None or (window_size is not None and window_counts is None):
            counts, window_counts = _count(scale_map, anchor, num_scales, finite, window_size)
        size, window_packing, prefix = sum(map(sum, counts)), None, num_prefix_tokens
        if window_size is None or window_counts is None:
            image, row, col = torch.nonzero_static(anchor, size=size).unbind(1)
        else:
            index = torch.nonzero_static(in_windows(anchor, window_size), size=size)
            image, row, col = from_windows(index, window_size)
            window_packing = Packing.from_seqlens(window_seqlens(window_counts, prefix), scale_map.device)
        lists, scale = [list(per_scale) for per_scale in counts], scale_map[image, row, col].long()
        packing = Packing.from_seqlens([sum(n) + prefix for n in lists], scale_map.device, height * width + prefix)
        grids = list(grid_sizes) if grid_sizes is not None else [(height, width)] * num_images
        options = (patch_size, num_scales, prefix, grids)
        return cls(*options, scale_map, image, scale, row, col, lists, packing, window_size, window_packing)

    @property
    def seqlens(self) -> list[int]:
        """Tokens of each image, prefix tokens included."""
        return self.packing.seqlens

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32 offsets of the images' sequences."""
        return self.packing.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return self.packing.max_seqlen

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed sequence, prefix tokens included."""
        return sum(self.seqlens)

    @property
    def num_images(self) -> int:
        return len(self.seqlens)

    @property
    def num_patches(self) -> int:
        return self.num_tokens - self.num_images * self.num_prefix_tokens

    @property
    def keep_ratio(self) -> float:
        """Patch tokens kept / patch tokens of the uniform grid, over all images; NaN without images."""
        return self.num_patches / (sum(rows * cols for rows, cols in self.grid_sizes) or float("nan"))

    @property
    def read_ratio(self) -> float:
        """As `keep_ratio`, counting also the patch tokens that the scorer ran through the blocks."""
        return self.keep_ratio if self.cache is None else self.cache.read_ratio(self)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether nothing is merged."""
        return not any(sum(coarser) for _, *coarser in self.counts)

    @cached_property
    def patch_index(self) -> Tensor:
        """(N,) place of each patch token in the packed sequence."""
        prefix = self.num_prefix_tokens
        first = torch.arange(prefix, prefix + self.num_patches, device=self.image.device)
        return first.add_(self.image, alpha=prefix)

    @cached_property
    def restore_index(self) -> Tensor:
        """(B, max rows, max columns) packed position of the token that covers each base cell (0 outside an image)."""
        position = torch.zeros_like(self.scale_map, dtype=torch.long)
        position[self.image, self.row, self.col] = self.patch_index
        batch, height, width = self.scale_map.shape
        covers_all = all(grid == (height, width) for grid in self.grid_sizes)
        scale = (self.scale_map if covers_all else self.scale_map.clamp(min=0)).long()
        inside = -1 << scale  # clears the bits below the patch's side
        image = torch.arange(batch, device=inside.device)[:, None, None]
        row = torch.arange(height, device=inside.device)[:, None] & inside
        col = torch.arange(width, device=inside.device) & inside
        restored = position[image, row, col]
        return restored if covers_all else restored * (self.scale_map >= 0)

    def prefix_of(self, tokens: Tensor) -> Tensor:
        """Prefix tokens of each image. (T, D) packed tokens -> (B, P, D)"""
        if self.packing.is_dense:
            return self.packing.to_batch(tokens)[:, : self.num_prefix_tokens]
        front = torch.arange(self.num_prefix_tokens, device=tokens.device)
        return tokens[self.cu_seqlens[:-1, None].long() + front]

    def patches(self, image: int) -> Tensor:
        """Patches of one image in raster order of their top left corners, for drawing.

        Args:
            image: Number of the image in the batch.

        Returns:
            (n, 3) rows (y, x, size) in pixels.
        """
        selected = self.image == image
        row, col, side = self.row[selected], self.col[selected], 1 << self.scale[selected]
        order = (row * (1 << 32) + col).argsort()
        return torch.stack([row, col, side], dim=1)[order] * self.patch_size


@lru_cache(maxsize=64)
def _coarsest_starting(height: int, width: int) -> Tensor:
    """(h, w) uint8: the coarsest scale whose patches may have their top left corner in a cell."""
    with torch.inference_mode(False):  # the cached tensor is used in training too
        coarsest = torch.zeros(height, width, dtype=torch.uint8)
        for scale in range(1, max(height, width).bit_length()):
            coarsest[:: 1 << scale, :: 1 << scale] = scale
        return coarsest


def _count(
    scale_map: Tensor, anchor: Tensor, num_scales: int, finite: Tensor | None, window_size: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Patches of each scale and in each window, for each image. Synchronises with the device."""
    scales = torch.arange(num_scales, dtype=scale_map.dtype, device=scale_map.device)
    per_scale = (scale_map.where(anchor, -1)[:, None] == scales[:, None, None]).sum((2, 3))  # (B, S)
    if finite is None:
        finite = torch.ones(len(scale_map), dtype=torch.bool, device=scale_map.device)
    parts = [finite[:, None], per_scale]
    if window_size is not None:
        parts.append(count_in_windows(anchor, window_size))
    counts: list[list[int]] = torch.cat(parts, dim=1).tolist()
    for image, (state, *_) in enumerate(counts):
        if state < 1:
            problem = "holds NaN or infinite pixels: check how it was read and normalised"
            raise ValueError(f"image {image} {'got NaN scores: check the scorer' if state else problem}")
    return [row[1 : 1 + num_scales] for row in counts], [row[1 + num_scales :] for row in counts]
