"""Clips: what did not change since it was last read is not read again.

Each frame is cut into patches as a picture is. A patch that an earlier frame has read at the same place and size, and
whose pixels have not changed since, is no token of this frame: its frame attends to the rows that stand for it. All
frames of a clip run together, block by block, so those rows are there.

    frame 0   a b c d         rows  a b c d
    frame 1   a b e d         rows  e           attends to  a b e d
    frame 2   a b e d         rows  (prefix)    attends to  a b e d

With nothing reused each frame is what the model makes of it alone. Frames that are all the same cost their prefix
tokens and give the same answer. In between, reused rows were computed beside what the earlier frame held: that is the
approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.tokens import Rotation
from aptvit.layers.attention import packed, run_inside
from aptvit.layers.features import PackedFeatures
from aptvit.patching.layout import Packing, PatchLayout
from aptvit.patching.scoring import ReadsTwice

if TYPE_CHECKING:
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["Clip", "choose_rows", "run_clip"]


@dataclass(frozen=True, eq=False)
class Clip:
    """Which rows stand for the tokens of a clip's frames.

    Attributes:
        layout: Of the frames, each cut completely.
        rows: (R,) tokens of the layout that are read, in its order.
        stands_for: (T,) for each token of the layout the place in ``rows`` of the one that stands for it.
        frame_rows: For each frame how many rows it adds, prefix tokens included.
    """

    layout: PatchLayout
    rows: Tensor
    stands_for: Tensor
    frame_rows: list[int]

    @cached_property
    def frame_keys(self) -> list[Tensor]:
        """For each frame the places in ``rows`` that its rows attend to."""
        return list(self.stands_for.split(self.layout.seqlens))

    @property
    def keep_ratio(self) -> float:
        """Rows that are read / tokens of uniform frames, without prefix tokens."""
        prefix = self.layout.num_prefix_tokens * self.layout.num_images
        return (len(self.rows) - prefix) / sum(rows * cols for rows, cols in self.layout.grid_sizes)


@torch.no_grad()
def choose_rows(model: AdaptivePatchTransformer, frames: Tensor, tolerance: float) -> Clip:
    """Cut the frames of a clip, and find what need not be read again.

    Args:
        model: The adaptive model.
        frames: (T, C, H, W) in the order of time, as the model takes images.
        tolerance: Mean absolute change of a base patch's pixels, on the scale of 0 to 255, up to which it is unchanged;
            below 0 nothing is reused.
    """
    plain = model.layout(frames)
    cells = _cells(model, frames)  # (T, h, w, pixels)
    block = 2 ** (model.num_scales - 1)
    scale_map = plain.scale_map.clone()
    last_read = torch.zeros(scale_map.shape[1:], dtype=torch.long, device=frames.device)
    reused = torch.zeros_like(scale_map, dtype=torch.bool)
    rows, cols = torch.meshgrid(
        *(torch.arange(side, device=frames.device) for side in scale_map.shape[1:]), indexing="ij"
    )
    for time in range(1, len(frames)):
        change = (cells[time] - cells[last_read, rows, cols]).abs().mean(-1)
        still = change <= tolerance
        # A decision near its threshold would flicker: where nothing changed, it stays.
        scale_map[time] = torch.where(_everywhere(still, block), scale_map[time - 1], scale_map[time])
        whole = torch.zeros_like(still)
        for scale in range(model.num_scales):
            its = scale_map[time] == scale
            same = its & (scale_map[time - 1] == scale) & still
            whole |= its & _everywhere(same, 1 << scale)
        reused[time] = whole
        last_read = torch.where(whole, last_read, torch.full_like(last_read, time))
    layout = PatchLayout.from_scale_map(
        scale_map,
        model.patch_size,
        model.num_scales,
        plain.num_prefix_tokens,
        plain.grid_sizes,
        None,
        finite=torch.ones(len(frames), dtype=torch.bool, device=frames.device),
    )
    return _clip(layout, reused)


def _cells(model: AdaptivePatchTransformer, frames: Tensor) -> Tensor:
    """(T, C, H, W) -> (T, h, w, C p p) on the scale of 0 to 255."""
    size = model.patch_size
    (group,) = model.patchifier.groups(frames)  # filled up to whole patches, if the model does that
    pixels = model.patchifier.pixels(group.images)
    return pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def _everywhere(cells: Tensor, side: int) -> Tensor:
    """(h, w): whether all cells of the aligned square of ``side`` cells that each lies in are true."""
    rows, cols = cells.shape
    padded = F.pad(cells.float(), (0, -cols % side, 0, -rows % side), value=1.0)
    least = -F.max_pool2d(-padded[None], side)[0]
    return least.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :cols] > 0


def _clip(layout: PatchLayout, reused: Tensor) -> Clip:
    """Rows of a layout without what is reused."""
    device, num_tokens = layout.image.device, layout.num_tokens
    position = layout.patch_index  # of each patch in the packed sequence
    again = reused[layout.image, layout.row, layout.col]
    read = torch.ones(num_tokens, dtype=torch.bool, device=device)
    read[position[again]] = False
    place = torch.full((num_tokens,), -1, dtype=torch.long, device=device)
    rows = read.nonzero()[:, 0]
    place[rows] = torch.arange(len(rows), device=device)
    stands_for = place.clone()
    token = layout.restore_index  # (T, h, w) packed position of each cell's token
    standing = place[token[0]]
    for time in range(1, layout.num_images):
        standing = torch.where(reused[time], standing, place[token[time]])
        stands_for[token[time].flatten()] = standing.flatten()
    counts = torch.zeros(layout.num_images, dtype=torch.long, device=device)
    frame = torch.repeat_interleave(torch.tensor(layout.seqlens, device=device))
    counts.index_add_(0, frame[rows], torch.ones_like(rows))
    return Clip(layout, rows, stands_for, counts.tolist())


class _FrameAttention(packed):
    """Rows of a frame attend to all that stands for it, whichever frame read it."""

    def __init__(self, clip: Clip, packing: Packing) -> None:
        super().__init__(packing)
        self.clip = clip

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        outs, bias, start = [], self.packing.key_bias, 0
        for one, keys in zip(query.split(self.clip.frame_rows, dim=2), self.clip.frame_keys, strict=True):
            its = key.index_select(2, keys), value.index_select(2, keys)
            mask = None if bias is None else bias[None, start : start + len(keys)].to(one.dtype)
            outs.append(F.scaled_dot_product_attention(one, *its, mask, dropout_p=dropout_p, scale=scale))
            start += len(keys)
        return torch.cat(outs, dim=2)


@torch.no_grad()
def run_clip(model: AdaptivePatchTransformer, frames: Tensor, tolerance: float) -> tuple[PackedFeatures, Clip]:
    """Features of all frames, as `AdaptivePatchTransformer.forward_features` gives them of pictures.

    Arguments as for `choose_rows`.

    Raises:
        ValueError: If the frames are no clip, or the model has windows.
    """
    if not (isinstance(frames, Tensor) and frames.ndim == 4):
        raise ValueError("a clip is one tensor of frames (T, C, H, W), all of one size")
    if model.window_size is not None:
        raise ValueError("clips know no windows: adapt the model without window_size")
    if isinstance(model.patchifier.scorer, ReadsTwice):
        raise ValueError("clips are read once: adapt the model with a scorer other than 'preview'")
    if model.training:
        raise ValueError("clips are for inference: call model.eval()")
    clip = choose_rows(model, frames, tolerance)
    x, rotation, _ = model.enter(frames, clip.layout)
    x = x.index_select(1, clip.rows)
    turned = None if rotation is None else Rotation(rotation.globally.index_select(-2, clip.rows))
    arguments = model.adapter.block_arguments(None if turned is None else turned.globally)
    packing = model._blocks.runs(clip.layout).images
    for block, its in zip(model.adapter.blocks, arguments, strict=True):
        x = run_inside(_FrameAttention(clip, packing), block, x, its)
    tokens = model.adapter.norm(x)[0].index_select(0, clip.stands_for)
    return PackedFeatures(tokens, clip.layout), clip
