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

from aptvit.encoder.block_input import BlockInput, Runs
from aptvit.encoder.first_pass import LeftByBlock
from aptvit.encoder.passes import SecondPass, run_and_leave, run_beside
from aptvit.encoder.tokens import Rotation
from aptvit.hosts import Adapter
from aptvit.layers.attention import Backend, run_block
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.patching.layout import Packing, PatchLayout

__all__ = ["BlockStack", "check_global_blocks", "take_indices"]


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
        self._run = _Run()
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

    def runs(self, layout: PatchLayout) -> Runs:
        """What may attend to each other, and how much each token weighs there."""
        runs = Runs(layout.packing, layout.window_packing)
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
        given, blocks = BlockInput(x, rotation, self.runs(layout)), list(self.adapter.blocks)[:stop]
        if self._left is not None:
            return self._first_pass(blocks, given, taken, self._left)
        if layout.first_pass is not None and not layout.is_uniform:
            return self._second_pass(blocks, given, layout, taken)
        return self._only_pass(blocks, given, taken)

    def _only_pass(self, blocks: Sequence[nn.Module], given: BlockInput, taken: dict[int, Tensor | None]) -> Tensor:
        assert given.runs is not None
        # Runs of one length are a plain batch. In training they are not: stochastic depth wants to see the runs.
        plain = given.runs.is_one_batch and given.runs.key_bias is None and self.attention is None
        if plain and not any(block.training for block in blocks):
            (x, *maps), *_ = self._through(blocks, given.as_batch(), tuple(taken))
            x, *maps = (one.flatten(0, 1)[None] for one in (x, *maps))
        else:
            (x, *maps), *_ = self._through(blocks, self._filled(given), tuple(taken))
            x, *maps = (one[:, : given.x.shape[1]] for one in (x, *maps))
        taken.update(zip(taken, maps, strict=True))
        return x

    def _first_pass(
        self,
        blocks: Sequence[nn.Module],
        given: BlockInput,
        taken: dict[int, Tensor | None],
        left: list[LeftByBlock],
    ) -> Tensor:
        """All blocks leave what they attend to, and their outputs."""
        assert given.runs is not None
        whole = slice(given.x.shape[1])
        given = given if given.runs.is_one_batch else self._filled(given)
        (_, *outs), *keys_values = self._through(blocks, given, tuple(range(len(blocks))), leaving=True)
        for out, its in zip(outs, keys_values, strict=True):
            left.append(LeftByBlock.of_tensors(out[:, whole], [one[:, :, whole] for one in its]))
        taken.update({number: left[number].out for number in taken})
        return left[-1].out

    def _second_pass(
        self, blocks: Sequence[nn.Module], given: BlockInput, layout: PatchLayout, taken: dict[int, Tensor | None]
    ) -> Tensor:
        """What the first pass made of coarse patches, and the others through the blocks beside it."""
        again = SecondPass(layout)
        if len(again.first.blocks) < len(blocks):
            raise ValueError(
                f"a first pass of {len(again.first.blocks)} blocks was made for a network that reads no further, "
                f"{len(blocks)} are asked for: adapt the host once for each network"
            )
        assert given.runs is not None
        rows, *maps = [given.x.index_select(1, again.rows)] * (1 + len(taken))
        if again.num_rows:  # or all is known already
            turned = None if given.rotation is None else given.rotation.of_rows(again.rows)
            given = self._filled(BlockInput(rows, turned, again.runs, again.known(given.runs)))
            (rows, *maps), *_ = self._through(blocks, given, tuple(taken))
        for number, one in zip(taken, maps, strict=True):
            taken[number] = again.complete(one[:, : again.num_rows], number)
        return again.complete(rows[:, : again.num_rows], len(blocks) - 1)

    def _filled(self, given: BlockInput) -> BlockInput:
        return given if self.token_bucket is None else given.filled(self.token_bucket)

    def _through(
        self, blocks: Sequence[nn.Module], given: BlockInput, wanted: tuple[int, ...], leaving: bool = False
    ) -> list[list[Tensor]]:
        """The last output and those of the blocks that are wanted; then what each block leaves: keys and values."""
        graphs, device = self.graphs, given.x.device.type
        if graphs is None or torch.is_grad_enabled() or device != graphs.device_type:
            return self._one_by_one(blocks, given, wanted, leaving)
        # In a graph lengths are what the device holds, and one graph serves all lengths up to a maximum.
        bucket = self.token_bucket or 1

        def run(*tensors: Tensor) -> list[list[Tensor]]:
            return self._one_by_one(blocks, given.held(iter(tensors), bucket), wanted, leaving)

        key = (len(blocks), wanted, leaving, given.key(bucket), torch.is_autocast_enabled(device))
        return graphs(key, run, list(given.tensors()))

    def _one_by_one(
        self, blocks: Sequence[nn.Module], given: BlockInput, wanted: tuple[int, ...], leaving: bool
    ) -> list[list[Tensor]]:
        x, maps, left = given.x, [], []
        run = self._run.checkpointed() if self.grad_checkpointing and any(one.training for one in blocks) else self._run
        for number, call in enumerate(self._calls(blocks, given.rotation, given.runs)):
            if leaving:
                x, *keys_values = run.leaving(call.block, x, *call.rest)
                left.append(keys_values)
            elif given.known is not None:
                x = run.beside(call.block, x, *call.rest, given.known.in_block(number, call.windowed))
            else:
                x = run.alone(call.block, x, *call.rest)
            if number in wanted:
                maps.append(x)
        return [[x, *maps], *left]

    def _calls(self, blocks: Sequence[nn.Module], rotation: Rotation | None, runs: Runs | None) -> Iterator[_Call]:
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
        self._run = _Run().each(partial(torch.compile, *args, **{"dynamic": True, **kwargs}))

    def clear(self) -> None:
        """Forget what was recorded with parameters."""
        if self.graphs is not None:
            self.graphs.clear()

    def __getstate__(self) -> dict[str, Any]:
        # As PyTorch does: copies and pickles of a compiled module are not compiled.
        return {**self.__dict__, "_run": _Run()}


@dataclass(frozen=True, eq=False)
class _Call:
    """A block, what `run_block` takes after the tokens, and whether its attention stays in windows."""

    block: nn.Module
    rest: tuple[dict[str, Any], Packing | None, Backend | None, Packing | None]
    windowed: bool


@dataclass(frozen=True)
class _Run:
    """How one block is run: alone, in the first of two passes, and in the second."""

    alone: Callable[..., Tensor] = run_block
    leaving: Callable[..., list[Tensor]] = run_and_leave
    beside: Callable[..., Tensor] = run_beside

    def each(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> _Run:
        return _Run(change(self.alone), change(self.leaving), change(self.beside))

    def checkpointed(self) -> _Run:
        return self.each(lambda run: partial(checkpoint, run, use_reentrant=False))


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
