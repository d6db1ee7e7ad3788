"""Clips: patches that did not change since an earlier frame are not computed again.

Each frame is cut into patches as an image is. A patch is reused if an earlier frame computed a patch of the same place
and size, and its pixels have not changed since. It adds no row to the packed sequence; its frame attends to the row of
the earlier frame. All frames of a clip run together, block by block, so that these rows are available.

    frame 0   a b c d         rows  a b c d
    frame 1   a b e d         rows  e           attends to  a b e d
    frame 2   a b e d         rows  (prefix)    attends to  a b e d

Without reuse the result of each frame is that of the frame as an image. Frames that are all equal cost their prefix
tokens and give equal results. In between the result is approximate: reused rows attended to patches of the earlier
frame.
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
    """The tokens of a clip's frames, and the rows that are computed for them.

    Attributes:
        layout: All patches of all frames.
        rows: (R,) tokens of the layout that are computed, in order.
        row_index: (T,) for each token of the layout, the index in ``rows`` of the token computed for it.
        frame_rows: Number of rows of each frame, prefix tokens included.
    """

    layout: PatchLayout
    rows: Tensor
    row_index: Tensor
    frame_rows: list[int]

    @property
    def keep_ratio(self) -> float:
        """Computed rows / tokens of uniform frames, without prefix tokens."""
        prefix = self.layout.num_prefix_tokens * self.layout.num_images
        return (len(self.rows) - prefix) / sum(rows * cols for rows, cols in self.layout.grid_sizes)


@torch.no_grad()
def choose_rows(patchifier: Patchifier, frames: Tensor, tolerance: float) -> Clip:
    """Cut the frames of a clip into patches, and find the patches that can be reused.

    Args:
        patchifier: The adaptive model's patchifier.
        frames: (T, C, H, W) in temporal order, as the model takes images.
        tolerance: Greatest mean absolute change of the pixels of an unchanged base patch, on the scale of 0 to 255;
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
        # Scores near their threshold would flicker: where nothing changed, the scale stays.
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
    """(h, w) whether all cells are true in the square of side ``side``, aligned to its multiples, around each cell."""
    rows, cols = cells.shape
    padded = F.pad(cells.float(), (0, -cols % side, 0, -rows % side), value=1.0)
    least = -F.max_pool2d(-padded[None], side)[0]
    return least.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :cols] > 0


def _clip(layout: PatchLayout, reused: Tensor) -> Clip:
    """The clip of a layout and the (T, h, w) cells whose patches are reused."""
    device, num_tokens = layout.image.device, layout.num_tokens
    position = layout.patch_index  # of each patch in the packed sequence
    is_reused = reused[layout.image, layout.row, layout.col]
    read = torch.ones(num_tokens, dtype=torch.bool, device=device)
    read[position[is_reused]] = False
    place = torch.full((num_tokens,), -1, dtype=torch.long, device=device)
    rows = read.nonzero()[:, 0]
    place[rows] = torch.arange(len(rows), device=device)
    row_index = place.clone()
    token = layout.restore_index  # (T, h, w) packed position of each cell's token
    source_row = place[token[0]]
    for time in range(1, layout.num_images):
        source_row = torch.where(reused[time], source_row, place[token[time]])
        row_index[token[time].flatten()] = source_row.flatten()
    counts = torch.zeros(layout.num_images, dtype=torch.long, device=device)
    frame = torch.repeat_interleave(torch.tensor(layout.seqlens, device=device))
    counts.index_add_(0, frame[rows], torch.ones_like(rows))
    return Clip(layout, rows, row_index, counts.tolist())


@torch.no_grad()
def run_clip(encoder: Encoder, patchifier: Patchifier, frames: Tensor, tolerance: float) -> tuple[PackedFeatures, Clip]:
    """Features of all frames, as `aptvit.AdaptivePatchTransformer.forward_features` computes them for images.

    Args:
        encoder: The adaptive model's encoder.
        patchifier: The adaptive model's patchifier.
        frames: (T, C, H, W), as for `choose_rows`.
        tolerance: As for `choose_rows`.

    Returns:
        Normalised features of all tokens of all frames, and which of them were computed.

    Raises:
        ValueError: If frames are not one tensor, or the model has windows, a scorer that runs the blocks, or is in
            training mode.
    """
    if not (isinstance(frames, Tensor) and frames.ndim == 4):
        raise ValueError("a clip is one tensor of frames (T, C, H, W), all of one size")
    if encoder.window_size is not None:
        raise ValueError("clips cannot be read in windows: adapt the model without window_size")
    if isinstance(patchifier.scorer, EncodingScorer):
        raise ValueError("clips cannot be read in two passes: adapt the model with a scorer other than 'preview'")
    if encoder.adapter.vit.training:
        raise ValueError("clips are for inference: call model.eval()")
    clip = choose_rows(patchifier, frames, tolerance)
    derived = encoder.derived.fresh(encoder.derived.check(), waited=False)
    tokens = encoder.embed(patchifier.groups(frames), clip.layout, derived)
    tokens = Tokens(encoder.adapter.before_blocks(tokens.x), tokens.rotation)
    # Tokens of a frame attend to the rows of all its patches, of whichever frame they are.
    queries = Packing.from_seqlens(clip.frame_rows, tokens.x.device)
    frame_plan = encoder.plan(clip.layout)
    plan = AttentionPlan(Segments(queries, frame_plan.images.keys), None, frame_plan.key_bias, clip.row_index)
    x = encoder.run(select_tokens(tokens, clip.rows), plan).x
    features = encoder.adapter.norm(x)[0].index_select(0, clip.row_index)
    return PackedFeatures(features, clip.layout), clip
