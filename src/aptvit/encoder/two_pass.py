"""Two passes through the blocks: all patches coarse, then the fine patches of the layout.

The results of the first pass decide which patches are fine (`aptvit.scorers.preview`). Coarse tokens are not computed
again: in every block they are those of the first pass, and in the second pass fine patches and prefix tokens attend to
the keys and values of the first.

first pass    all 2x patches        A B C D    each block attends to  A B C D
layout        A and B stay coarse, C and D become fine
second pass   fine patches only     c c c c d d d d    attends to  A B c c c c d d d d

If no patch is coarse, the second pass is the uniform model. If no patch is fine, the first pass is the model that
merges everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aptvit.encoder.cache import select_tokens
from aptvit.encoder.encoder import BlockOutputs, Encoder, Request, Tokens
from aptvit.layers.attention import AttentionPlan, Segments
from aptvit.patching.images import ImageGroup
from aptvit.patching.layout import Packing, PatchLayout
from aptvit.patching.layouts import uniform_layout

__all__ = ["FirstPass", "FirstPassBlock", "run_first_pass"]


@dataclass(frozen=True, eq=False)
class FirstPassBlock:
    """Results of one block in the first pass.

    Attributes:
        keys_values: (1, H, T, d) keys and (1, H, T, e) values of each attention in the block.
        output: (1, T, D) output of the block.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    output: Tensor


@dataclass(frozen=True, eq=False)
class FirstPass:
    """Results of the first pass for a batch: an `aptvit.encoder.cache.EncoderCache`.

    Attributes:
        position: (B, max rows, max columns) position in the first pass of the token that covers each base cell.
        blocks: Results of each block.
        learned: Whether gradients were recorded, so that it can be used in one step of training.
    """

    position: Tensor
    blocks: list[FirstPassBlock]
    learned: bool = False

    @classmethod
    def of_groups(cls, passes: Sequence[FirstPass | None], groups: Sequence[ImageGroup]) -> FirstPass | None:
        """Join the first passes of groups of images.

        Args:
            passes: For each group its first pass; None for images smaller than a 2x patch.
            groups: The images by size.

        Returns:
            The first pass of the whole batch; None if no group has one.
        """
        present = [(part, group) for part, group in zip(passes, groups, strict=True) if part is not None]
        if not present:
            return None
        if len(groups) == 1:
            return present[0][0]
        passes_of_images = [first for first, _ in present]
        sides = [max(first.position.shape[dim] for first in passes_of_images) for dim in (1, 2)]
        num_images = sum(len(group.index) for group in groups)
        position, start = passes_of_images[0].position.new_zeros(num_images, *sides), 0
        for first, group in present:
            rows, cols = first.position.shape[1:]
            position[group.index, :rows, :cols] = first.position + start
            start += first.num_tokens
        blocks = [_joined(parts) for parts in zip(*(first.blocks for first in passes_of_images), strict=True)]
        return cls(position, blocks, passes_of_images[0].learned)

    @property
    def num_tokens(self) -> int:
        return self.blocks[0].output.shape[1]

    def read_ratio(self, layout: PatchLayout) -> float:
        """Patch tokens of both passes / patch tokens of the uniform grid."""
        large = sum(min(grid) > 1 for grid in layout.grid_sizes)  # images with a first pass
        first = self.num_tokens - large * layout.num_prefix_tokens
        fine = sum(fine for fine, *_ in layout.counts)
        return (first + fine) / sum(rows * cols for rows, cols in layout.grid_sizes)

    def tensors(self) -> list[Tensor]:
        """All tensors of the first pass."""
        tensors = [self.position]
        for block in self.blocks:
            tensors += [block.output, *(tensor for pair in block.keys_values for tensor in pair)]
        return tensors

    def run(self, encoder: Encoder, tokens: Tokens, layout: PatchLayout, request: Request) -> BlockOutputs:
        """The second pass: runs the blocks on fine patches and prefix tokens.

        Args:
            encoder: The adaptive model's encoder.
            tokens: (1, T, D) all tokens of the layout.
            layout: The layout of the images.
            request: Which blocks to run, and what to return.

        Returns:
            Outputs of all tokens of the layout.

        Raises:
            ValueError: If more blocks are requested than ran in the first pass.
        """
        number = len(encoder.adapter.blocks) if request.stop is None else request.stop
        if len(self.blocks) < number:
            raise ValueError(
                f"the first pass ran {len(self.blocks)} blocks for a network that reads no further, but {number} are "
                "requested: adapt the host once for each network"
            )
        second = _SecondPass(self, layout)
        if second.num_tokens:
            plan = second.plan(encoder.plan(layout))
            outputs = encoder.run(select_tokens(tokens, second.index), plan, request)
        else:  # all tokens are from the first pass
            empty = tokens.x[:, :0]
            outputs = BlockOutputs(empty, dict.fromkeys(request.indices, empty))
        completed = {block: second.complete(x, block) for block, x in outputs.intermediates.items()}
        return BlockOutputs(second.complete(outputs.x, number - 1), completed)


def _joined(parts: Sequence[FirstPassBlock]) -> FirstPassBlock:
    pairs = zip(*(part.keys_values for part in parts), strict=True)
    keys_values = [(torch.cat([k for k, _ in pair], dim=2), torch.cat([v for _, v in pair], dim=2)) for pair in pairs]
    return FirstPassBlock(keys_values, torch.cat([part.output for part in parts], dim=1))


def run_first_pass(
    encoder: Encoder, group: ImageGroup, num_scales: int, stop: int | None, learned: bool
) -> tuple[BlockOutputs, PatchLayout, FirstPass]:
    """Run the blocks on images of one size in 2x patches.

    Args:
        encoder: The adaptive model's encoder.
        group: The images, at least two base patches a side.
        num_scales: Number of patch sizes of the model.
        stop: Number of blocks to run; None for all.
        learned: Record gradients.

    Returns:
        Outputs of all blocks, the layout of these outputs, and the first pass.
    """
    adapter = encoder.adapter
    grid = group.grid_size(adapter.patch_size)
    options = (adapter.num_prefix_tokens, encoder.window_size, group.images.device)
    layout = uniform_layout(len(group.index), grid, adapter.patch_size, num_scales, *options, scale=1)
    renumbered = replace(group, index=list(range(len(group.index))))
    tokens = encoder.embed([renumbered], layout)
    tokens = Tokens(adapter.before_blocks(tokens.x), tokens.rotation)
    numbers = range(len(adapter.blocks) if stop is None else stop)
    # All patches have the same area, so there is no bias.
    plan = AttentionPlan.of_tokens(layout.packing, layout.window_packing)
    outputs = encoder.run(tokens, plan, Request(tuple(numbers), stop, ("key", "value")))
    blocks = [
        FirstPassBlock(list(zip(recorded[::2], recorded[1::2], strict=True)), outputs.intermediates[number])
        for number, recorded in zip(numbers, outputs.recorded, strict=True)
    ]
    return outputs, layout, FirstPass(layout.restore_index, blocks, learned)


class _SecondPass:
    """The tokens of the second pass, and the keys that they attend to.

    Args:
        first: The first pass.
        layout: The layout of the images.

    Attributes:
        num_tokens: R, the number of tokens of the second pass.
        index: (R,) tokens of the layout that are computed: prefix tokens and fine patches.
        source: (T,) for each token of the layout, its index in [tokens of the first pass, tokens of the second pass].
    """

    def __init__(self, first: FirstPass, layout: PatchLayout) -> None:
        self._first, self._layout = first, layout
        self.num_tokens = layout.num_tokens - sum(sum(coarse) for _, *coarse in layout.counts)
        is_computed = torch.ones(layout.num_tokens, dtype=torch.bool, device=layout.image.device)
        is_computed[layout.patch_index] = layout.scale == 0
        self.index = torch.nonzero_static(is_computed, size=self.num_tokens)[:, 0]
        cached = layout.restore_index.new_zeros(layout.num_tokens)
        # Images without a first pass may be wider than all images with one; all their tokens are computed.
        row, col = layout.row.clamp(max=first.position.shape[1] - 1), layout.col.clamp(max=first.position.shape[2] - 1)
        cached[layout.patch_index] = first.position[layout.image, row, col]
        self.source = torch.where(is_computed, is_computed.cumsum(0) - 1 + first.num_tokens, cached)

    def plan(self, full_plan: AttentionPlan) -> AttentionPlan:
        """The plan of the second pass: its tokens attend to all tokens of the layout.

        Args:
            full_plan: The plan of all tokens of the layout.
        """
        layout, device = self._layout, self._layout.image.device
        queries = Packing.from_seqlens([layout.num_prefix_tokens + fine for fine, *_ in layout.counts], device)
        windows = None
        if full_plan.windows is not None:
            windows = Segments(Packing.from_seqlens(_fine_in_windows(layout), device), full_plan.windows.keys)
        cached = [block.keys_values for block in self._first.blocks]
        return AttentionPlan(Segments(queries, full_plan.images.keys), windows, full_plan.key_bias, self.source, cached)

    def complete(self, x: Tensor, block: int) -> Tensor:
        """Output of a block for all tokens of the layout, from that of the second pass. (1, R, D) -> (1, T, D)"""
        return torch.cat([self._first.blocks[block].output.to(x.dtype), x], dim=1).index_select(1, self.source)


def _fine_in_windows(layout: PatchLayout) -> list[int]:
    """Number of fine patches in each window; the prefix tokens of an image are a separate window."""
    assert layout.window_packing is not None and layout.window_size is not None
    cells = layout.window_size**2
    lengths, fine = iter(layout.window_packing.seqlens), []
    for rows, cols in layout.grid_sizes:
        fine += [next(lengths)] if layout.num_prefix_tokens else []
        fine += [(4 * next(lengths) - cells) // 3 for _ in range(rows * cols // cells)]  # of n + (cells - n) / 4
    return fine
