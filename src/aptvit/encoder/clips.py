"""Clips: what did not change since it was last read is not read again.

Each frame is cut into patches as an image is. A patch that an earlier frame has read at the same place and size, and
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

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.cache import select_tokens
from aptvit.encoder.encoder import Encoder, Tokens
from aptvit.layers.attention import AttentionPlan, Segments
from aptvit.patching.features import PackedFeatures
from aptvit.patching.layout import Packing, PatchLayout
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import EncodingScorer

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

    @property
    def keep_ratio(self) -> float:
        """Rows that are read / tokens of uniform frames, without prefix tokens."""
        prefix = self.layout.num_prefix_tokens * self.layout.num_images
        return (len(self.rows) - prefix) / sum(rows * cols for rows, cols in self.layout.grid_sizes)


@torch.no_grad()
def choose_rows(patchifier: Patchifier, frames: Tensor, tolerance: float) -> Clip:
    """Cut the frames of a clip, and find what need not be read again.

    Args:
        patchifier: Of the adaptive model.
        frames: (T, C, H, W) in the order of time, as the model takes images.
        tolerance: Mean absolute change of a base patch's pixels, on the scale of 0 to 255, up to which it is unchanged;
            below 0 nothing is reused.
    """
    groups = patchifier.groups(frames)
    frame_layout = patchifier(groups)
    cells = _cells(patchifier, groups[0].images)  # (T, h, w, pixels)
    block = 2 ** (frame_layout.num_scales - 1)
    scale_map = frame_layout.scale_map.clone()
    last_read = torch.zeros(scale_map.shape[1:], dtype=torch.long, device=frames.device)
    reused = torch.zeros_like(scale_map, dtype=torch.bool)
    rows, cols = torch.meshgrid(
        *(torch.arange(side, device=frames.device) for side in scale_map.shape[1:]), indexing="ij"
    )
    for time in range(1, len(frames)):
        change = (cells[time] - cells[last_read, rows, cols]).abs().mean(-1)
        unchanged = change <= tolerance
        # A decision near its threshold would flicker: where nothing changed, it stays.
        scale_map[time] = torch.where(_all_in_square(unchanged, block), scale_map[time - 1], scale_map[time])
        reusable = torch.zeros_like(unchanged)
        for scale in range(frame_layout.num_scales):
            at_scale = scale_map[time] == scale
            unchanged_at_scale = at_scale & (scale_map[time - 1] == scale) & unchanged
            reusable |= at_scale & _all_in_square(unchanged_at_scale, 1 << scale)
        reused[time] = reusable
        last_read = torch.where(reusable, last_read, torch.full_like(last_read, time))
    layout = PatchLayout.from_scale_map(
        scale_map,
        frame_layout.patch_size,
        frame_layout.num_scales,
        frame_layout.num_prefix_tokens,
        frame_layout.grid_sizes,
        None,
        finite=torch.ones(len(frames), dtype=torch.bool, device=frames.device),
    )
    return _clip(layout, reused)


def _cells(patchifier: Patchifier, frames: Tensor) -> Tensor:
    """(T, C, H, W) whole patches -> (T, h, w, C p p) on the scale of 0 to 255."""
    size = patchifier.patch_size
    pixels = patchifier.normalization.pixels(frames)
    return pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def _all_in_square(cells: Tensor, side: int) -> Tensor:
    """(h, w): whether all cells of the aligned square of ``side`` cells that each lies in are true."""
    rows, cols = cells.shape
    padded = F.pad(cells.float(), (0, -cols % side, 0, -rows % side), value=1.0)
    least = -F.max_pool2d(-padded[None], side)[0]
    return least.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :cols] > 0


def _clip(layout: PatchLayout, reused: Tensor) -> Clip:
    """Rows of a layout without what is reused."""
    device, num_tokens = layout.image.device, layout.num_tokens
    position = layout.patch_index  # of each patch in the packed sequence
    is_reused = reused[layout.image, layout.row, layout.col]
    read = torch.ones(num_tokens, dtype=torch.bool, device=device)
    read[position[is_reused]] = False
    place = torch.full((num_tokens,), -1, dtype=torch.long, device=device)
    rows = read.nonzero()[:, 0]
    place[rows] = torch.arange(len(rows), device=device)
    stands_for = place.clone()
    token = layout.restore_index  # (T, h, w) packed position of each cell's token
    source_row = place[token[0]]
    for time in range(1, layout.num_images):
        source_row = torch.where(reused[time], source_row, place[token[time]])
        stands_for[token[time].flatten()] = source_row.flatten()
    counts = torch.zeros(layout.num_images, dtype=torch.long, device=device)
    frame = torch.repeat_interleave(torch.tensor(layout.seqlens, device=device))
    counts.index_add_(0, frame[rows], torch.ones_like(rows))
    return Clip(layout, rows, stands_for, counts.tolist())


@torch.no_grad()
def run_clip(encoder: Encoder, patchifier: Patchifier, frames: Tensor, tolerance: float) -> tuple[PackedFeatures, Clip]:
    """Features of all frames, as `aptvit.AdaptivePatchTransformer.forward_features` gives them of images.

    Args:
        encoder: Of the adaptive model.
        patchifier: Of the adaptive model.
        frames: As for `choose_rows`.
        tolerance: As for `choose_rows`.

    Raises:
        ValueError: If the frames are no clip, or the model has windows.
    """
    if not (isinstance(frames, Tensor) and frames.ndim == 4):
        raise ValueError("a clip is one tensor of frames (T, C, H, W), all of one size")
    if encoder.window_size is not None:
        raise ValueError("clips know no windows: adapt the model without window_size")
    if isinstance(patchifier.scorer, EncodingScorer):
        raise ValueError("clips are read once: adapt the model with a scorer other than 'preview'")
    if encoder.adapter.vit.training:
        raise ValueError("clips are for inference: call model.eval()")
    clip = choose_rows(patchifier, frames, tolerance)
    derived = encoder.derived.fresh(encoder.derived.check(), waited=False)
    tokens = encoder.embed(patchifier.groups(frames), clip.layout, derived)
    tokens = Tokens(encoder.adapter.before_blocks(tokens.x), tokens.rotation)
    # Tokens of a frame attend to all that stands for it, whichever frame read it.
    queries = Packing.from_seqlens(clip.frame_rows, tokens.x.device)
    frame_plan = encoder.plan(clip.layout)
    plan = AttentionPlan(Segments(queries, frame_plan.images.keys), None, frame_plan.key_bias, clip.stands_for)
    x = encoder.run(select_tokens(tokens, clip.rows), plan).x
    features = encoder.adapter.norm(x)[0].index_select(0, clip.stands_for)
    return PackedFeatures(features, clip.layout), clip
