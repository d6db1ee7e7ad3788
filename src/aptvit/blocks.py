"""The host's own blocks, one after the other: on a plain batch, packed, filled up to a bucket, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aptvit.adapters import Adapter
from aptvit.attention import Backend, run_block
from aptvit.first_pass import LeftByBlock
from aptvit.graphs import BlockGraphs
from aptvit.layout import Packing, PatchLayout
from aptvit.passes import Beside, SecondPass, run_and_leave, run_beside
from aptvit.tokens import Rotation

__all__ = ["BlockStack", "check_global_blocks", "rotation_of_batch", "take_indices"]


class BlockStack:
    """How the blocks of a host are run.

    Args:
        adapter: The host's.
        attention: Backend; None for the best one for the tensors at hand.
        token_bucket: Fill packed sequences up to a multiple of this many tokens.
        global_blocks: Blocks that attend to the whole image where there are windows; the others stay inside them.
        area_bias: How much the logarithm of a patch's area adds to its logits as a key.

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
        area_bias: float = 0.0,
    ) -> None:
        self.adapter = adapter
        self.area_bias = area_bias
        self.global_blocks = global_blocks
        self.attention = attention
        self.token_bucket = token_bucket
        self.graphs: BlockGraphs | None = None
        self.grad_checkpointing = False
        self._run_block: Callable[..., Tensor] = run_block
        self._left: list[LeftByBlock] | None = None

    @property
    def token_bucket(self) -> int | None:
        return self._token_bucket

    @token_bucket.setter
    def token_bucket(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"token_bucket={value} must be at least 1: lengths are filled up to a multiple of it")
        self._token_bucket = value

    @property
    def area_bias(self) -> float:
        return self._area_bias

    @area_bias.setter
    def area_bias(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"area_bias={value} must be at least 0: 1 lets a patch weigh as much as those it replaces")
        self._area_bias = value

    @property
    def in_first_pass(self) -> bool:
        return self._left is not None

    @contextmanager
    def first_pass(self) -> Iterator[list[LeftByBlock]]:
        """Inside, blocks leave what a second pass reads. All patches are of one size there, and weigh the same."""
        before, self._left = self._left, []
        try:
            yield self._left
        finally:
            self._left = before

    def runs(self, layout: PatchLayout) -> _Runs:
        """What may attend to each other, and how much each token weighs there."""
        runs = _Runs(layout.packing, layout.window_packing)
        if not self.area_bias or layout.is_uniform or self.in_first_pass:
            return runs
        return runs.biased(self.area_bias * layout.log_area)

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
        num_tokens, runs = x.shape[1], self.runs(layout)
        blocks = list(self.adapter.blocks)[:stop]
        if layout.first_pass is not None and not layout.is_uniform:
            return self._second_pass(blocks, x, rotation, runs, layout, taken)
        if self.in_first_pass:
            return self._first_pass(blocks, x, rotation, runs, taken)
        # Runs of one length are a plain batch. In training they are not: stochastic depth wants to see the runs.
        plain = runs.windows is None and runs.images.is_dense and self.attention is None
        if plain and runs.key_bias is None and not any(block.training for block in blocks):
            globally = None if rotation is None else rotation_of_batch(rotation.globally, runs.images)
            turned = None if globally is None else Rotation(globally)
            x = self._through(blocks, runs.images.to_batch(x[0]), turned, None, taken).flatten(0, 1)[None]
            taken.update({i: one.flatten(0, 1)[None] for i, one in taken.items() if one is not None})
            return x
        if self.token_bucket is not None:
            x, rotation, runs = _filled(x, rotation, runs, self.token_bucket)
        x = self._through(blocks, x, rotation, runs, taken)[:, :num_tokens]
        taken.update({i: one[:, :num_tokens] for i, one in taken.items() if one is not None})
        return x

    def _second_pass(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Rotation | None,
        runs: _Runs,
        layout: PatchLayout,
        taken: dict[int, Tensor | None],
    ) -> Tensor:
        """What the first pass made of coarse patches, and the others through the blocks beside it."""
        again = SecondPass(layout)
        if len(again.first.blocks) < len(blocks):
            raise ValueError(
                f"a first pass of {len(again.first.blocks)} blocks was made for a network that reads no further, "
                f"{len(blocks)} are asked for: adapt the host once for each network"
            )
        x = x.index_select(1, again.rows)
        rotation = None if rotation is None else rotation.of_rows(again.rows)
        run = self._checkpointed(run_beside, blocks)
        for number, call in enumerate(self._calls(blocks, rotation, _Runs(again.images, again.windows))):
            if again.num_rows:  # or all is known already
                beside = Beside(runs.of(call.windowed), again.source, again.first.blocks[number])
                x = run(call.block, x, *call.rest, beside)
            if number in taken:
                taken[number] = again.complete(x, number)
        return again.complete(x, len(blocks) - 1)

    def _first_pass(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Rotation | None,
        runs: _Runs,
        taken: dict[int, Tensor | None],
    ) -> Tensor:
        assert self._left is not None
        for number, call in enumerate(self._calls(blocks, rotation, runs)):
            left = run_and_leave(call.block, x, *call.rest)
            self._left.append(left)
            x = left.out
            if number in taken:
                taken[number] = x
        return x

    def _checkpointed(self, run: Callable[..., Tensor], blocks: Sequence[nn.Module]) -> Callable[..., Tensor]:
        if self.grad_checkpointing and any(block.training for block in blocks):
            return partial(checkpoint, run, use_reentrant=False)
        return run

    def _through(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Rotation | None,
        runs: _Runs | None,
        taken: dict[int, Tensor | None],
    ) -> Tensor:
        """On packed tokens (1, T, D) or, without runs, on a plain batch (B, L, D)."""
        if self.graphs is None or torch.is_grad_enabled() or x.device.type != self.graphs.device_type:
            out, *maps = self._one_by_one(blocks, x, rotation, runs, tuple(taken))
        else:
            out, *maps = self._recorded(self.graphs, blocks, x, rotation, runs, tuple(taken))
        taken.update(zip(taken, maps, strict=True))
        return out

    def _recorded(
        self,
        graphs: BlockGraphs,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Rotation | None,
        runs: _Runs | None,
        wanted: tuple[int, ...],
    ) -> list[Tensor]:
        """In a graph lengths are what the device holds, and one graph serves all lengths up to a maximum."""
        turns = [] if rotation is None else [one for one in (rotation.globally, rotation.in_windows) if one is not None]
        packings = [] if runs is None else [one for one in (runs.images, runs.windows) if one is not None]
        limits = [one.max_seqlen + -one.max_seqlen % (self.token_bucket or 1) for one in packings]
        biases = [] if runs is None or runs.key_bias is None else [runs.key_bias]

        def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
            turned = Rotation(*rest[: len(turns)]) if turns else None
            offsets = zip(packings, rest[len(turns) :][: len(packings)], limits, strict=True)
            held = [Packing.of_offsets(one.seqlens, cu_seqlens, limit) for one, cu_seqlens, limit in offsets]
            its = _Runs(*held) if held else None
            return self._one_by_one(blocks, x, turned, its.biased(rest[-1]) if its and biases else its, wanted)

        dense = tuple(one.is_dense for one in packings)  # a plain batch to attention, at lengths that shapes tell
        key = (len(blocks), wanted, tuple(limits), dense, torch.is_autocast_enabled(x.device.type))
        return graphs(key, run, [x, *turns, *(one.cu_seqlens for one in packings), *biases])

    def _one_by_one(
        self,
        blocks: Sequence[nn.Module],
        x: Tensor,
        rotation: Rotation | None,
        runs: _Runs | None,
        wanted: tuple[int, ...],
    ) -> list[Tensor]:
        """The last output, and those of the blocks that are wanted."""
        run, maps = self._checkpointed(self._run_block, blocks), []
        for number, call in enumerate(self._calls(blocks, rotation, runs)):
            x = run(call.block, x, *call.rest)
            if number in wanted:
                maps.append(x)
        return [x, *maps]

    def _calls(self, blocks: Sequence[nn.Module], rotation: Rotation | None, runs: _Runs | None) -> Iterator[_Call]:
        """Blocks in windows differ in the offsets that attention reads, and in the positions that it turns by."""
        globally = self.adapter.block_arguments(None if rotation is None else rotation.globally)
        inside = self.adapter.block_arguments(None if rotation is None else rotation.in_windows)
        for number, block in enumerate(blocks):
            if runs is None:
                yield _Call(block, (globally[number], None, self.attention, None), windowed=False)
            elif runs.windows is None or number in self.global_blocks:
                yield _Call(block, (globally[number], runs.images, self.attention, None), windowed=False)
            else:
                yield _Call(block, (inside[number], runs.windows, self.attention, runs.images), windowed=True)

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


@dataclass(frozen=True, eq=False)
class _Call:
    """A block, what `run_block` takes after the tokens, and whether its attention stays in windows."""

    block: nn.Module
    rest: tuple[dict[str, Any], Packing | None, Backend | None, Packing | None]
    windowed: bool


@dataclass(frozen=True, eq=False)
class _Runs:
    """What may attend to each other: rows of an image, and where there are windows, of a window."""

    images: Packing
    windows: Packing | None = None

    @property
    def key_bias(self) -> Tensor | None:
        return self.images.key_bias

    def of(self, windowed: bool) -> Packing:
        """Those that a block's attention stays in."""
        if not windowed:
            return self.images
        assert self.windows is not None
        return self.windows

    def biased(self, key_bias: Tensor) -> _Runs:
        return _Runs(self.images.biased(key_bias), None if self.windows is None else self.windows.biased(key_bias))


def _filled(x: Tensor, rotation: Rotation | None, runs: _Runs, multiple: int) -> tuple[Tensor, Rotation | None, _Runs]:
    """Filled up to a multiple of tokens by one run more; runs of one length that are a multiple stay a plain batch."""
    more = -x.shape[1] % multiple
    if more == 0 and runs.images.is_dense and (runs.windows is None or runs.windows.is_dense):
        return x, rotation, runs
    fill = (0, 0, 0, more)
    if rotation is not None:
        inside = None if rotation.in_windows is None else nn.functional.pad(rotation.in_windows, fill)
        rotation = Rotation(nn.functional.pad(rotation.globally, fill), inside)
    windows = None if runs.windows is None else runs.windows.padded(multiple)
    return nn.functional.pad(x, fill), rotation, _Runs(runs.images.padded(multiple), windows)


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
