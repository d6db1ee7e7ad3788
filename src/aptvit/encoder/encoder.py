"""Tokens and blocks of an adapted host: from images and their layout to the outputs of its own blocks.

images, layout ── embed ──> Tokens ── plan: segments of attention ── run: the host's blocks ──> BlockOutputs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aptvit.encoder.derived import DerivedValues, DerivedWeights
from aptvit.hosts.adapter import Adapter
from aptvit.layers.attention import AttentionPlan, BlockAttention, run_block
from aptvit.layers.patch_embed import COARSE_PREFIX, PatchOrder, embed_directly, patch_reader
from aptvit.layers.position_embed import PositionTable, Rotation
from aptvit.layers.rotary import rotations_of_scales
from aptvit.patching.images import ImageGroup, Normalization
from aptvit.patching.layout import PatchLayout

__all__ = ["ALL_BLOCKS", "BlockOutputs", "BlockStep", "Encoder", "Request", "Tokens", "collect"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Input of the first block.

    Attributes:
        x: (1, T, D) packed tokens, or a plain batch (B, L, D).
        rotation: Rotary embeddings of the tokens; None if the host has none.
    """

    x: Tensor
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Request:
    """Which blocks to run, and what to return.

    Attributes:
        indices: Blocks whose outputs are returned.
        stop: Number of blocks to run; None for all.
        record: Tensors of each attention to return: "query", "key", "value".
    """

    indices: tuple[int, ...] = ()
    stop: int | None = None
    record: tuple[str, ...] = ()


ALL_BLOCKS = Request()


@dataclass(frozen=True, eq=False)
class BlockStep:
    """Output of one block.

    Attributes:
        number: Number of the block.
        x: (1, T, D) output.
        recorded: (1, H, T, d) queries, keys and values of its attention, those that were requested.
    """

    number: int
    x: Tensor
    recorded: list[Tensor]


@dataclass(frozen=True, eq=False)
class BlockOutputs:
    """Outputs of the blocks.

    Attributes:
        x: (1, T, D) output of the last block that ran.
        intermediates: (1, T, D) outputs of the requested blocks, by block number.
        recorded: Recorded tensors of each block, as in `BlockStep`.
    """

    x: Tensor
    intermediates: dict[int, Tensor] = field(default_factory=dict)
    recorded: list[list[Tensor]] = field(default_factory=list)


class Encoder:
    """Runs a host's embedding and blocks on packed tokens.

    Args:
        adapter: The host's adapter.
        normalization: Normalisation of float images.
        window_size: Side in base patches of the windows that blocks attend inside of; None without windows.
        global_blocks: Blocks that attend to the whole image although there are windows.

    Attributes:
        attention: Attention backend; None for the best backend for the tensors.
        bucket: Pads packed sequences to a multiple of tokens (`aptvit.encoder.buckets`); None for no padding.
        area_bias: Factor of the logarithm of a patch's area that is added to its logits as a key.
        read_as: The layout whose patches are embedded, see `aptvit.encoder.readings`; None for that of the tokens.
        graphs: CUDA graphs of the blocks (`aptvit.encoder.buckets`); None for launches without a graph.
        grad_checkpointing: Recompute each block in the backward pass instead of storing its activations.
        derived: Cache of values that are derived from the host's parameters.
    """

    def __init__(
        self,
        adapter: Adapter,
        normalization: Normalization,
        window_size: int | None = None,
        global_blocks: frozenset[int] = frozenset(),
    ) -> None:
        self.adapter, self.normalization = adapter, normalization
        self.window_size, self.global_blocks = window_size, global_blocks
        self.attention: str | None = None
        self.bucket: Any = None
        self.read_as: Callable[[PatchLayout], PatchLayout] | None = None
        self.graphs: Any = None
        self.area_bias, self.grad_checkpointing = 0.0, False
        self.derived = DerivedWeights(adapter)
        self._run_block: Callable[..., list[Tensor]] = run_block

    # Embedding

    def embed(self, groups: Sequence[ImageGroup], layout: PatchLayout, derived: DerivedValues | None = None) -> Tokens:
        """Tokens of the patches, before the host's ``norm_pre``.

        Args:
            groups: The images by size.
            layout: The layout of the images.
            derived: Values derived from the host's current state; None calls the modules, with gradients.
        """
        layout = layout if self.read_as is None else self.read_as(layout)
        adapter, order = self.adapter, PatchOrder(layout, groups)
        rows = adapter.patch_norm(self._rows(groups, layout, order, derived))  # (N, D), sorted by `order`
        absolute, rotation = self._positions(groups, layout, order, derived)
        # In the precision of the positions: under autocast only the linear maps are in half precision.
        dtype = rows.dtype if absolute is None else torch.promote_types(rows.dtype, absolute.dtype)
        x = order.packed(adapter.prefix_tokens().to(dtype), rows.to(dtype))  # (T, D)
        return Tokens((x if absolute is None else x + absolute)[None], rotation)

    def _rows(
        self, groups: Sequence[ImageGroup], layout: PatchLayout, order: PatchOrder, derived: DerivedValues | None
    ) -> Tensor:
        """Embeddings of all patches (N, D), scale by scale and group by group."""
        adapter, coarse = self.adapter, getattr(self.adapter.vit, COARSE_PREFIX, None)
        by_group: list[list[Tensor]] = []
        for group, selections in zip(groups, order.selections(), strict=True):
            if derived is not None and not layout.is_uniform:
                read = patch_reader(group.images, self.normalization, adapter.dtype)
                by_group.append(derived.maps.embed(read, selections))
                continue
            used = selections if derived is None else selections[:1]  # in training each parameter gets a gradient
            images = self.normalization.normalised(group.images).to(adapter.dtype)
            by_group.append(embed_directly(adapter.patch_embed, coarse, images, used))
        parts = [rows for scale_rows in zip(*by_group, strict=True) for rows in scale_rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _positions(
        self, groups: Sequence[ImageGroup], layout: PatchLayout, order: PatchOrder, derived: DerivedValues | None
    ) -> tuple[Tensor | None, Rotation | None]:
        """(T, D) absolute positions, and rotary embeddings; None for kinds that the host does not have."""
        grids, window = tuple(group.grid_size(layout.patch_size) for group in groups), layout.window_size
        tables = [self.position_table(grids, layout.num_scales, derived)]
        if tables[0].absolute is None and tables[0].rotary is None:
            return None, None
        if window is not None:
            tiles = ((window, window),) * len(groups)
            tables.append(self.position_table(tiles, layout.num_scales, derived, tiled=True))
        rows = torch.stack([table.rows(order.key, order.cells) for table in tables], dim=1)  # (N, tables)
        index = order.packed(rows.new_zeros(layout.num_prefix_tokens, len(tables)), rows).unbind(1)  # (T,) each
        absolute = None if tables[0].absolute is None else tables[0].absolute.index_select(0, index[0])
        pairs = zip((table.rotary for table in tables), index, strict=True)
        rotary = [table.index_select(-2, i) for table, i in pairs if table is not None]
        return absolute, Rotation(*rotary) if rotary else None

    def position_table(
        self,
        grid_sizes: tuple[tuple[int, int], ...],
        num_scales: int,
        derived: DerivedValues | None = None,
        tiled: bool = False,
    ) -> PositionTable:
        """Positions of all patches on several grids.

        Args:
            grid_sizes: (h, w) of each grid, in base patches.
            num_scales: Number of patch sizes.
            derived: As for `embed`.
            tiled: As for `PositionTable`.
        """

        def compute() -> PositionTable:
            tables = [self.positions_of_scales(grid, num_scales) for grid in grid_sizes]
            return PositionTable.of_grids(tables, grid_sizes, self.adapter.device, tiled)

        if derived is None or self.adapter.positions_vary():
            return compute()
        return derived.get((grid_sizes, num_scales, tiled), compute)

    def positions_of_scales(
        self, grid_size: tuple[int, int], num_scales: int
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """For each scale (n, D) absolute positions and (..., n, 2 R) rotary embeddings of its complete patches."""
        adapter = self.adapter
        rotary: list[Tensor | None] = [None] * num_scales
        if adapter.has_rotation:
            rotary = [*rotations_of_scales(adapter.rotation_table, grid_size, num_scales, adapter.relative_positions)]
        return [(adapter.position_table(grid_size, 1 << scale), table) for scale, table in enumerate(rotary)]

    # Blocks

    def plan(self, layout: PatchLayout) -> AttentionPlan:
        """Segments of attention of a layout, and the bias by area."""
        bias = None
        if self.area_bias and not layout.is_uniform:
            bias = torch.zeros(layout.num_tokens, device=layout.image.device)  # nothing for prefix tokens
            bias[layout.patch_index] = self.area_bias * math.log(4) * layout.scale  # log of the base patches covered
        return AttentionPlan.of_tokens(layout.packing, layout.window_packing, bias)

    def __call__(self, tokens: Tokens, layout: PatchLayout, request: Request = ALL_BLOCKS) -> BlockOutputs:
        """Run the host's blocks on the tokens of a layout, reusing the layout's cache.

        Args:
            tokens: (1, T, D), from `embed`.
            layout: The layout of the tokens.
            request: Which blocks to run, and what to return.
        """
        if layout.cache is not None and not layout.is_uniform:
            return layout.cache.run(self, tokens, layout, request)
        return self.run(tokens, self.plan(layout), request)

    def run(self, tokens: Tokens, plan: AttentionPlan, request: Request = ALL_BLOCKS) -> BlockOutputs:
        """Run the host's blocks: as a plain batch, packed, padded to a bucket, or by a CUDA graph.

        Args:
            tokens: (1, T, D).
            plan: Which tokens attend to which keys.
            request: Which blocks to run, and what to return.
        """
        # In training a plain batch stays packed: stochastic depth drops whole images.
        if plan.is_batch and not request.record and self.attention is None and not self.is_training:
            outputs = self._collect(_as_batch(tokens, plan), None, request)
            intermediates = {number: x.flatten(0, 1)[None] for number, x in outputs.intermediates.items()}
            return BlockOutputs(outputs.x.flatten(0, 1)[None], intermediates)
        if self.bucket is None or (plan.is_batch and request.record):
            return self._collect(tokens, plan, request)
        padded: tuple[Tokens, AttentionPlan] = self.bucket.padded(tokens, plan)
        return self.bucket.cut(self._collect(*padded, request), tokens.x.shape[1])

    def _collect(self, tokens: Tokens, plan: AttentionPlan | None, request: Request) -> BlockOutputs:
        if self.graphs is not None and not torch.is_grad_enabled() and tokens.x.device.type == self.graphs.device_type:
            return self.graphs.run(self, tokens, plan, request)
        return collect(tokens.x, self.steps(tokens, plan, request), request.indices)

    def steps(self, tokens: Tokens, plan: AttentionPlan | None, request: Request = ALL_BLOCKS) -> Iterator[BlockStep]:
        """Run the host's blocks one after the other: the only loop over them.

        Args:
            tokens: (1, T, D), or a plain batch (B, L, D) without a plan.
            plan: Which tokens attend to which keys.
            request: Which blocks to run, and what to return.
        """
        x, rotation, backend = tokens.x, tokens.rotation, self.attention
        # Without tokens there is nothing to do, and some hosts cannot reshape them.
        run: Any = self._run_block if x.numel() else lambda block, x, *_: [x]
        globally = self.adapter.block_arguments(None if rotation is None else rotation.globally)
        in_windows = self.adapter.block_arguments(None if rotation is None else rotation.in_windows)
        if self.grad_checkpointing and self.is_training:
            run = partial(checkpoint, run, use_reentrant=False)
        for number, block in enumerate(list(self.adapter.blocks)[: request.stop]):
            windowed = plan is not None and plan.windows is not None and number not in self.global_blocks
            attention = BlockAttention.of_plan(plan, number, windowed, backend, request.record) if plan else None
            x, *recorded = run(block, x, (in_windows if windowed else globally)[number], attention)
            yield BlockStep(number, x, recorded)

    @property
    def is_training(self) -> bool:
        return any(block.training for block in self.adapter.blocks)

    def clear(self) -> None:
        """Drop everything derived from or recorded with parameters."""
        self.derived.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `run_block`, one graph for all blocks; takes the arguments of ``torch.compile``."""
        self._run_block = torch.compile(run_block, *args, **{"dynamic": True, **kwargs})

    def __getstate__(self) -> dict[str, Any]:
        # As in PyTorch, copies and pickles of a compiled module are not compiled.
        return {**self.__dict__, "_run_block": run_block}


def collect(x: Tensor, steps: Iterator[BlockStep], indices: Collection[int] = ()) -> BlockOutputs:
    """Run all steps and collect their outputs.

    Args:
        x: Input of the first block.
        steps: Outputs of the blocks, in order.
        indices: Blocks whose outputs are kept.
    """
    outputs, recorded = {}, []
    for step in steps:
        x = step.x
        recorded.append(step.recorded)
        if step.number in indices:
            outputs[step.number] = x
    return BlockOutputs(x, outputs, recorded)


def _as_batch(tokens: Tokens, plan: AttentionPlan) -> Tokens:
    """Packed tokens of images of one length as a plain batch. (1, T, D) -> (B, L, D)"""
    images, rotation = plan.images.queries, tokens.rotation
    if rotation is not None:
        rotary = images.to_batch(rotation.globally)  # (B, L, R) for all heads, or (B, depth, H, L, R)
        rotation = Rotation(rotary[:, None] if rotary.ndim == 3 else rotary.transpose(0, 1))
    return Tokens(images.to_batch(tokens.x[0]), rotation)
