"""The host's own blocks, one after the other: on a plain batch, packed, filled up to a bucket, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aptvit.adapters import Adapter
from aptvit.attention import Backend, run_block
from aptvit.graphs import BlockGraphs
from aptvit.layout import Packing, PatchLayout
from aptvit.tokens import Rotation

__all__ = ["BlockStack", "check_global_blocks", "rotation_of_batch", "take_indices"]


class BlockStack:
    """How the blocks of a host are run.

    Args:
        adapter: The host's.
        attention: Backend; None for the best one for the tensors at hand.
        token_bucket: Fill packed sequences up to a multiple of this many tokens.
        global_blocks: Blocks that attend to the whole image where there are windows; the others stay inside them.

    Attributes:
        graphs: CUDA graphs of the blocks, None while they are launched one by one.
        grad_checkpointing: Compute each block again in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        adapter: Adapter,
        attention: Backend | None,
        token_bucket: int | None,
        global_blocks: frozenset[int] = frozenset(),
    ) -> None:
        self.adapter = adapter
        self.global_blocks = global_blocks
        self.attention = attention
        self.token_bucket = token_bucket
        self.graphs: BlockGraphs | None = None
        self.grad_checkpointing = False
        self._run_block: Callable[..., Tensor] = run_block

    @property
    def token_bucket(self) -> int | None:
        return self._token_bucket

    @token_bucket.setter
    def token_bucket(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"token_bucket={value} must be at least 1: lengths are filled up to a multiple of it")
        self._token_bucket = value

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation | None,
        layout: PatchLayout,
        taken: dict[int, Tensor | None],
        stop: int | None,
    ) -> Tensor:
        """The first ``stop`` blocks. (1, T, D) -> (1, T, D)

        Args:
            x: Packed tokens.
            rotation: Rotary embeddings of each, if the host has them.
            layout: Where each image's tokens are.
            taken: Filled with the outputs of the blocks that it names.
            stop: None for all blocks.
        """
        num_tokens, packing, windows = x.shape[1], layout.packing, layout.window_packing
        blocks = list(self.adapter.blocks)[:stop]
        everywhere = None if rotation is None else rotation.globally
        # Runs of one length are a plain batch. In training they are not: stochastic depth wants to see the runs.
        plain = packing.is_dense and self.attention is None and not any(block.training for block in blocks)
        if plain and windows is None:
            everywhere = None if everywhere is None else rotation_of_batch(everywhere, packing)
            x = self._through(blocks, packing.to_batch(x[0]), everywhere, None, taken).flatten(0, 1)[None]
            taken.update({i: one.flatten(0, 1)[None] for i, one in taken.items() if one is not None})
            return x
        if self.token_bucket is not None and windows is None:
            packing = packing.padded(self.token_bucket)
            fill = (0, 0, 0, packing.num_tokens - num_tokens)
            x = nn.functional.pad(x, fill)
            everywhere = None if everywhere is None else nn.functional.pad(everywhere, fill)
        if windows is None:
            x = self._through(blocks, x, everywhere, packing, taken)[:, :num_tokens]
        else:
            x = self._windowed(blocks, x, rotation, packing, windows, taken)
        taken.update({i: one[:, :num_tokens] for i, one in taken.items() if one is not None})
        return x

    def _windowed(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Rotation | None,
        images: Packing,
        windows: Packing,
        taken: dict[int, Tensor | None],
    ) -> Tensor:
        """Blocks differ in the offsets that attention reads, and in the positions that it turns by."""
        globally = self.adapter.block_arguments(None if rotation is None else rotation.globally)
        inside = self.adapter.block_arguments(None if rotation is None else rotation.in_windows)
        run = self._checkpointed(blocks)
        for i, block in enumerate(blocks):
            if i in self.global_blocks:
                x = run(block, x, globally[i], images, self.attention)
            else:
                x = run(block, x, inside[i], windows, self.attention, images)
            if i in taken:
                taken[i] = x
        return x

    def _checkpointed(self, blocks: Sequence[nn.Module]) -> Callable[..., Tensor]:
        if self.grad_checkpointing and any(block.training for block in blocks):
            return partial(checkpoint, self._run_block, use_reentrant=False)
        return self._run_block

    def _through(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Tensor | None,
        packing: Packing | None,
        taken: dict[int, Tensor | None],
    ) -> Tensor:
        """On packed tokens (1, T, D) or, without a packing, on a plain batch (B, L, D)."""
        if self.graphs is None or taken or torch.is_grad_enabled() or x.device.type != self.graphs.device_type:
            return self._one_by_one(blocks, x, rotation, packing, taken)
        # In a graph lengths are what the device holds, and one graph serves all lengths up to a maximum.
        inputs = [x] + ([] if rotation is None else [rotation])
        longest = 0
        if packing is not None:
            inputs.append(packing.cu_seqlens)
            longest = packing.max_seqlen + -packing.max_seqlen % (self.token_bucket or 1)

        def run(x: Tensor, *rest: Tensor) -> Tensor:
            rotation_here = None if rotation is None else rest[0]
            packing_here = None if packing is None else Packing.of_offsets(packing.seqlens, rest[-1], longest)
            return self._one_by_one(blocks, x, rotation_here, packing_here, taken)

        key = (len(blocks), packing is None, longest, torch.is_autocast_enabled(x.device.type))
        return self.graphs(key, run, inputs)

    def _one_by_one(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Tensor | None,
        packing: Packing | None,
        taken: dict[int, Tensor | None],
    ) -> Tensor:
        run = self._checkpointed(blocks)
        for i, (block, arguments) in enumerate(zip(blocks, self.adapter.block_arguments(rotation), strict=False)):
            x = run(block, x, arguments, packing, self.attention)
            if i in taken:
                taken[i] = x
        return x

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Takes the arguments of ``torch.compile``. All blocks share one graph, which serves every number of tokens."""
        self._run_block = torch.compile(run_block, *args, **{"dynamic": True, **kwargs})

    def clear(self) -> None:
        """Forget what was recorded with parameters."""
        if self.graphs is not None:
            self.graphs.clear()

    def __getstate__(self) -> dict[str, Any]:
        # As PyTorch does: copies and pickles of a compiled module are not compiled.
        return {**self.__dict__, "_run_block": run_block}


def rotation_of_batch(rotation: Tensor, packing: Packing) -> Tensor:
    """(T, R) -> (B, 1, L, R), the same for all heads; (depth, H, T, R) -> (depth, B, H, L, R)."""
    if rotation.ndim == 2:
        return packing.to_batch(rotation)[:, None]
    return packing.to_batch(rotation).transpose(0, 1)


def check_global_blocks(numbers: Sequence[int], window_size: int | None, num_blocks: int) -> frozenset[int]:
    """The blocks that are not windowed.

    Raises:
        ValueError: If there are no such blocks, or no windows.
    """
    if window_size is None and len(numbers):
        raise ValueError(f"global_blocks={list(numbers)} without window_size: all blocks are global already")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} must be at least one base patch")
    outside = [number for number in numbers if not 0 <= number < num_blocks]
    if outside:
        raise ValueError(f"global_blocks={list(numbers)}: there are blocks 0 to {num_blocks - 1}")
    return frozenset(numbers)


def take_indices(indices: int | Iterable[int] | None, num_blocks: int) -> list[int]:
    """Block numbers in order, as timm reads them.

    Raises:
        ValueError: If they name no blocks.
    """
    if indices is None:
        return list(range(num_blocks))
    if isinstance(indices, int):
        wanted = list(range(num_blocks - indices, num_blocks))
    else:
        wanted = sorted({i + num_blocks if i < 0 else i for i in indices})
    if not wanted or wanted[0] < 0 or wanted[-1] >= num_blocks:
        raise ValueError(f"indices={indices!r} name no blocks of {num_blocks}: use 0 to {num_blocks - 1}")
    return wanted
