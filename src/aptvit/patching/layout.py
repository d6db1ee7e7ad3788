"""Which patch sizes go where, in which order: the one value that every later stage reads.

scores {2: (B, h/2, w/2), 4: (B, h/4, w/4)}
   │  aptvit.patching.selection.choose_scales
   ▼
scale map (B, h, w): 0 where a base patch stays, i where a patch of 2^i x 2^i base patches covers the cell
   │  PatchLayout.from_scale_map
   ▼
PatchLayout: image, scale, row, col of each patch token, and how long each image's run is
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.first_pass import FirstPass

__all__ = ["Packing", "PatchLayout"]


@dataclass(frozen=True, eq=False)
class Packing:
    """Runs of a packed sequence that may attend to each other, and to nothing else.

    Lengths are kept three times, each where it can be read without waiting for a device.

    Attributes:
        seqlens: Length of each run.
        cu_seqlens: (runs + 1,) int32 offsets on the device of the tokens.
        max_seqlen: No run is longer.
        lengths_cpu: (runs + 1,) int64, the lengths and ``max_seqlen`` as a tensor on the CPU: an input of compiled
            graphs, so that a new set of lengths is new data and not a new graph.
        key_bias: (T,) what is added to the logits of each token as a key; None for nothing.
    """

    seqlens: list[int]
    cu_seqlens: Tensor
    max_seqlen: int
    lengths_cpu: Tensor
    key_bias: Tensor | None = None

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int], device: torch.device | str | None = None) -> Packing:
        """Packing of runs of these lengths."""
        offsets = torch.tensor([0, *itertools.accumulate(seqlens)], dtype=torch.int32)
        return cls.of_offsets(seqlens, offsets.to(device, non_blocking=True), max(seqlens))

    @classmethod
    def of_offsets(cls, seqlens: Sequence[int], cu_seqlens: Tensor, max_seqlen: int) -> Packing:
        """Packing whose offsets are on their device already."""
        return cls(list(seqlens), cu_seqlens, max_seqlen, torch.tensor([*seqlens, max_seqlen]))

    @property
    def num_tokens(self) -> int:
        return sum(self.seqlens)

    @cached_property
    def is_dense(self) -> bool:
        """Whether all runs have the same length, so that the sequence is a plain batch."""
        return len(set(self.seqlens)) <= 1

    def filled(self, more: int) -> Packing:
        """With one run more at the end, empty or not."""
        offsets = F.pad(self.cu_seqlens, (0, 1), value=self.num_tokens + more)
        filled = Packing.of_offsets([*self.seqlens, more], offsets, max(self.max_seqlen, more))
        return filled if self.key_bias is None else filled.biased(F.pad(self.key_bias, (0, more)))

    def biased(self, key_bias: Tensor | None) -> Packing:
        """The same runs, with another bias of their keys."""
        return replace(self, key_bias=key_bias)

    def to_batch(self, rows: Tensor) -> Tensor:
        """(..., T, D) -> (B, ..., L, D), where all runs have the same length."""
        return rows.unflatten(-2, (len(self.seqlens), self.seqlens[0])).movedim(-3, 0)

    def run_of_token(self, num_tokens: int) -> Tensor:
        """(T,) number of the run that each token belongs to."""
        runs = torch.arange(self.cu_seqlens.shape[0] - 1, device=self.cu_seqlens.device)
        return runs.repeat_interleave(self.cu_seqlens.diff(), output_size=num_tokens)


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """The patches of a batch of images, packed into one sequence.

    Patch tokens are ordered by (image, window, position in raster order); without windows an image is one window.
    In the packed sequence, each image's run starts with its prefix tokens (class token, registers).

    Attributes:
        patch_size: Side of a base patch in pixels.
        num_prefix_tokens: Prefix tokens at the front of each image's run.
        grid_sizes: (rows, columns) of base patches, for each image.
        scale_map: (B, max rows, max columns) int8: scale of the patch that covers each base cell, -1 outside an image.
        image: (N,) image of each patch token.
        scale: (N,) its scale: the patch covers 2^scale x 2^scale base patches.
        row: (N,) top row, in base patches.
        col: (N,) left column, in base patches.
        counts: Patches of each scale, for each image.
        packing: Runs of the packed sequence, prefix tokens included.
        window_packing: The same sequence cut into windows, for attention that stays inside them; prefix tokens of an
            image, if there are any, are a window of their own. None without windows.
        first_pass: What the blocks left of these images read coarsely, where that is what decided: see
            `aptvit.encoder.passes`.
    """

    patch_size: int
    num_prefix_tokens: int
    grid_sizes: list[tuple[int, int]]
    scale_map: Tensor
    image: Tensor
    scale: Tensor
    row: Tensor
    col: Tensor
    counts: list[list[int]]
    packing: Packing
    window_packing: Packing | None = None
    first_pass: FirstPass | None = None

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
    ) -> PatchLayout:
        """List the patches of a scale map. Waits for the device once, to learn how many there are.

        Args:
            scale_map: (B, rows, columns) scale of the patch over each base cell, -1 outside an image. A patch of
                scale i starts at multiples of 2^i and fills its whole cell.
            patch_size: Side of a base patch in pixels.
            num_scales: Scales that may occur in the map.
            num_prefix_tokens: Prefix tokens at the front of each image's run.
            grid_sizes: Base grid of each image; the whole map where it is not given.
            window_size: Side of a window in base patches; rows and columns of the map must be multiples of it.
            finite: (B,) whether each image holds numbers only; read along with the counts.
            counts: Patches of each scale, for each image, where they are known: without windows nothing waits then.

        Raises:
            ValueError: If a window does not hold the largest patch or does not divide the map, or an image is not
                finite.
        """
        num_images, height, width = scale_map.shape
        if window_size is not None:
            _check_window(window_size, num_scales, height, width)
        if counts is None and window_size is None and scale_map.device.type == "cpu" and not scale_map.any():
            if finite is not None:
                _check_finite(finite.tolist())
            return cls.uniform(num_images, (height, width), patch_size, num_scales, num_prefix_tokens)
        # The top left cell of a patch stands for it. The scale of cells outside, -1, is 255 without its sign.
        coarsest = _coarsest_starting(height, width).to(scale_map.device, non_blocking=True)
        anchor = scale_map.to(torch.int8).view(torch.uint8) <= coarsest
        windows = None
        if window_size is not None:
            # (B, h, w) -> (B, h/win, w/win, win, win): raster order of windows, then of positions inside each
            windows = anchor.unflatten(2, (-1, window_size)).unflatten(1, (-1, window_size)).transpose(2, 3)
        if counts is None or windows is not None:
            counts, in_windows = _count(scale_map, anchor, num_scales, finite, windows)
        seqlens = [sum(n) + num_prefix_tokens for n in counts]
        size = sum(map(sum, counts))
        window_packing = None
        if windows is None or window_size is None:
            image, row, col = torch.nonzero_static(anchor, size=size).unbind(1)
        else:
            image, win_row, win_col, row, col = torch.nonzero_static(windows, size=size).unbind(1)
            row, col = win_row * window_size + row, win_col * window_size + col
            runs = [length for its in in_windows for length in (num_prefix_tokens, *its) if length]
            window_packing = Packing.from_seqlens(runs, scale_map.device)
        return cls(
            patch_size=patch_size,
            num_prefix_tokens=num_prefix_tokens,
            grid_sizes=list(grid_sizes) if grid_sizes is not None else [(height, width)] * num_images,
            scale_map=scale_map,
            image=image,
            scale=scale_map[image, row, col].long(),
            row=row,
            col=col,
            counts=[list(n) for n in counts],
            packing=Packing.from_seqlens(seqlens, scale_map.device),
            window_packing=window_packing,
        )

    @classmethod
    def uniform(
        cls,
        num_images: int,
        grid_size: tuple[int, int],
        patch_size: int,
        num_scales: int,
        num_prefix_tokens: int = 0,
        window_size: int | None = None,
        device: torch.device | str | None = None,
        scale: int = 0,
    ) -> PatchLayout:
        """Images of one size in patches of one size. Everything follows from the sizes, so nothing waits.

        Args:
            num_images: B.
            grid_size: Base patches of each, (rows, columns).
            patch_size: Side of a base patch in pixels.
            num_scales: Scales that a model knows.
            num_prefix_tokens: Prefix tokens at the front of each image's run.
            window_size: Side of a window in base patches.
            device: Of the images.
            scale: Of all patches; 0 for nothing merged. What is left of a grid at the right and bottom is in none.

        Raises:
            ValueError: As for `from_scale_map`.
        """
        height, width = (side >> scale for side in grid_size)
        cells, side = height * width, None
        window_packing = None
        if window_size is not None:
            _check_window(window_size, num_scales, *grid_size)
            side = window_size >> scale
            prefix = [num_prefix_tokens] if num_prefix_tokens else []
            window_packing = Packing.from_seqlens([*prefix, *[side**2] * (cells // side**2)] * num_images, device)
        places = _cells(num_images, height, width, side, scale)
        image, row, col, scales = (one.to(device, non_blocking=True) for one in places)
        scale_map = torch.full((num_images, *grid_size), -1, dtype=torch.int8, device=device)
        scale_map[:, : height << scale, : width << scale] = scale
        none = [0] * num_scales
        return cls(
            patch_size=patch_size,
            num_prefix_tokens=num_prefix_tokens,
            grid_sizes=[grid_size] * num_images,
            scale_map=scale_map,
            image=image,
            scale=scales,
            row=row,
            col=col,
            counts=[[*none[:scale], cells, *none[scale + 1 :]] for _ in range(num_images)],
            packing=Packing.from_seqlens([cells + num_prefix_tokens] * num_images, device),
            window_packing=window_packing,
        )

    @classmethod
    def of_images(cls, chosen: Sequence[tuple[PatchLayout, int]]) -> PatchLayout:
        """Layout of a batch whose images are taken from other batches, without scoring them again or waiting.

        Args:
            chosen: For each image of the new batch, a layout without windows and the image's number there.

        Raises:
            ValueError: If there are no images, or the layouts were made for different models.
        """
        if not chosen:
            raise ValueError("there are no images: give at least one")
        kinds = {(one.patch_size, one.num_prefix_tokens, one.num_scales) for one, _ in chosen}
        if len(kinds) != 1:
            raise ValueError(f"layouts with (patch size, prefix tokens, scales) of {sorted(kinds)} are no one batch")
        ((patch_size, num_prefix_tokens, num_scales),) = kinds
        grids = [one.grid_sizes[image] for one, image in chosen]
        height, width = (max(side) for side in zip(*grids, strict=True))
        maps = [one.scale_map[image, : grid[0], : grid[1]] for (one, image), grid in zip(chosen, grids, strict=True)]
        scale_map = torch.stack(
            [F.pad(one, (0, width - one.shape[1], 0, height - one.shape[0]), value=-1) for one in maps]
        )
        counts = [one.counts[image] for one, image in chosen]
        return cls.from_scale_map(scale_map, patch_size, num_scales, num_prefix_tokens, grids, counts=counts)

    @property
    def seqlens(self) -> list[int]:
        """Tokens of each image, prefix tokens included."""
        return self.packing.seqlens

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32 offsets of the images' runs."""
        return self.packing.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest run."""
        return self.packing.max_seqlen

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed sequence, prefix tokens included."""
        return sum(self.seqlens)

    @property
    def num_images(self) -> int:
        return len(self.seqlens)

    @property
    def num_scales(self) -> int:
        return len(self.counts[0])

    @property
    def num_patches(self) -> int:
        return self.num_tokens - self.num_images * self.num_prefix_tokens

    @property
    def keep_ratio(self) -> float:
        """Patch tokens kept / patch tokens of the uniform grid, over all images."""
        return self.num_patches / sum(rows * cols for rows, cols in self.grid_sizes)

    @property
    def read_ratio(self) -> float:
        """As `keep_ratio`, of all patch tokens that go through the blocks: of two passes, those of both."""
        if self.first_pass is None:
            return self.keep_ratio
        large = sum(min(grid) > 1 for grid in self.grid_sizes)  # enough for a first pass
        first = self.first_pass.num_tokens - large * self.num_prefix_tokens
        fine = sum(fine for fine, *_ in self.counts)
        return (first + fine) / sum(rows * cols for rows, cols in self.grid_sizes)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether nothing is merged."""
        return not any(sum(coarser) for _, *coarser in self.counts)

    @cached_property
    def patch_index(self) -> Tensor:
        """(N,) where each patch token stands in the packed sequence."""
        return torch.arange(self.num_patches, device=self.image.device) + self.num_prefix_tokens * (self.image + 1)

    @cached_property
    def log_area(self) -> Tensor:
        """(T,) logarithm of the base patches that each token of the packed sequence covers; 0 of prefix tokens."""
        area = torch.zeros(self.num_tokens, device=self.image.device)
        area[self.patch_index] = self.scale * math.log(4)
        return area

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

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell PyTorch that another stream reads the layout too: memory is reused in the order of its own stream."""
        packings = [one for one in (self.packing, self.window_packing) if one is not None]
        offsets = (one.cu_seqlens for one in packings)
        seen = () if self.first_pass is None else self.first_pass.tensors()
        for tensor in (self.scale_map, self.image, self.scale, self.row, self.col, *offsets, *seen):
            tensor.record_stream(stream)

    def patches(self, image: int) -> Tensor:
        """Patches of one image in raster order of their top left corners, for people.

        Returns:
            (n, 3) rows (y, x, size) in pixels.
        """
        mine = self.image == image
        row, col, side = self.row[mine], self.col[mine], 1 << self.scale[mine]
        order = (row * (1 << 32) + col).argsort()
        return torch.stack([row, col, side], dim=1)[order] * self.patch_size


@lru_cache(maxsize=16)
def _cells(num_images: int, height: int, width: int, window_size: int | None, scale: int) -> tuple[Tensor, ...]:
    """(B h w,) image, row, column and scale of every patch of a scale, in the order of the packed sequence.

    Height, width and window are in such patches, rows and columns that are returned in base patches.
    """
    with torch.inference_mode(False):  # to be of use in training too
        cells = torch.cartesian_prod(torch.arange(num_images), torch.arange(height), torch.arange(width))
        if window_size is not None:
            grid = (num_images, height // window_size, window_size, width // window_size, window_size)
            cells = cells.unflatten(0, grid).transpose(2, 3).flatten(0, 4)
        image, row, col = cells.T.contiguous()
        return image, row << scale, col << scale, torch.full_like(image, scale)


@lru_cache(maxsize=64)
def _coarsest_starting(height: int, width: int) -> Tensor:
    """(h, w) uint8: the coarsest scale whose patches may have their top left corner in a cell."""
    with torch.inference_mode(False):
        coarsest = torch.zeros(height, width, dtype=torch.uint8)
        for scale in range(1, max(height, width).bit_length()):
            coarsest[:: 1 << scale, :: 1 << scale] = scale
        return coarsest


def _check_finite(finite: Sequence[int]) -> None:
    if not all(finite):
        broken = next(image for image, is_finite in enumerate(finite) if not is_finite)
        raise ValueError(f"image {broken} holds NaN or infinite pixels: check how it was read and normalised")


def _count(
    scale_map: Tensor, anchor: Tensor, num_scales: int, finite: Tensor | None, windows: Tensor | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Patches of each scale and in each window, for each image: the one wait for the device."""
    scales = torch.arange(num_scales, dtype=scale_map.dtype, device=scale_map.device)
    per_scale = (scale_map.where(anchor, -1)[:, None] == scales[:, None, None]).sum((2, 3))  # (B, S)
    if finite is None:
        finite = torch.ones(len(scale_map), dtype=torch.bool, device=scale_map.device)
    parts = [finite[:, None], per_scale]
    if windows is not None:
        parts.append(windows.sum((3, 4)).flatten(1))
    rows: list[list[int]] = torch.cat(parts, dim=1).tolist()
    _check_finite([row[0] for row in rows])
    return [row[1 : 1 + num_scales] for row in rows], [row[1 + num_scales :] for row in rows]


def _check_window(window_size: int, num_scales: int, height: int, width: int) -> None:
    largest = 2 ** (num_scales - 1)
    if window_size % largest:
        raise ValueError(
            f"a window of {window_size} base patches does not hold whole patches of {largest}: "
            f"use a multiple of {largest}"
        )
    if height % window_size or width % window_size:
        raise ValueError(
            f"a grid of {height}x{width} base patches is not made of whole windows of {window_size}: "
            f"pad the images to multiples of the window"
        )
