"""What blocks read: tokens, their rotary embeddings, who may attend to whom, and what is known beside them.

It can be filled up to a multiple of tokens, and be taken apart into tensors and put together again around others of the
same shapes, so that one CUDA graph serves many inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.tokens import Rotation
from aptvit.patching.layout import Packing

__all__ = ["Beside", "BlockInput", "Known", "Runs", "rotation_of_batch"]

KeysValues = Sequence[tuple[Tensor, Tensor]]  # (1, H, T, d) and (1, H, T, e), of each attention in a block


@dataclass(frozen=True, eq=False)
class Runs:
    """What may attend to each other: rows of an image, and where there are windows, of a window."""

    images: Packing
    windows: Packing | None = None

    @property
    def key_bias(self) -> Tensor | None:
        return self.images.key_bias

    @property
    def is_dense(self) -> bool:
        return all(packing.is_dense for packing in self.packings)

    @property
    def is_one_batch(self) -> bool:
        """Whether images of one length attend as a whole."""
        return self.windows is None and self.images.is_dense

    @property
    def packings(self) -> tuple[Packing, ...]:
        return (self.images,) if self.windows is None else (self.images, self.windows)

    def of(self, windowed: bool) -> Packing:
        """Those that a block's attention stays in."""
        if not windowed:
            return self.images
        assert self.windows is not None
        return self.windows

    def biased(self, key_bias: Tensor) -> Runs:
        return Runs(*(packing.biased(key_bias) for packing in self.packings))

    def filled(self, more: int) -> Runs:
        """With one run more, empty or not."""
        return Runs(*(packing.filled(more) for packing in self.packings))

    def limits(self, multiple: int) -> list[int]:
        """Longest run of each packing, rounded up."""
        return [packing.max_seqlen + -packing.max_seqlen % multiple for packing in self.packings]

    def tensors(self) -> Iterator[Tensor]:
        """Those on the device."""
        yield from (packing.cu_seqlens for packing in self.packings)
        if self.key_bias is not None:
            yield self.key_bias

    def held(self, tensors: Iterator[Tensor], multiple: int) -> Runs:
        """Around other tensors, of runs that are no longer than `limits`."""
        its = zip(self.packings, self.limits(multiple), strict=True)
        runs = Runs(*(Packing.of_offsets(one.seqlens, next(tensors), limit) for one, limit in its))
        return runs if self.key_bias is None else runs.biased(next(tensors))


@dataclass(frozen=True, eq=False)
class Beside:
    """What the rows of a second pass attend to in one block, themselves included.

    Attributes:
        keys: Runs of all that they attend to, one for each of the rows'.
        source: As in `Known`.
        keys_values: What the first pass left.
    """

    keys: Packing
    source: Tensor
    keys_values: KeysValues


@dataclass(frozen=True, eq=False)
class Known:
    """What the rows of a second pass attend to, themselves included (`aptvit.encoder.passes`).

    Attributes:
        runs: Of all that they attend to.
        source: (T,) for each of those its place in [tokens of the first pass, rows].
        blocks: Keys and values that the first pass left in each block.
    """

    runs: Runs
    source: Tensor
    blocks: Sequence[KeysValues]

    @property
    def num_first(self) -> int:
        """Tokens of the first pass."""
        return self.blocks[0][0][0].shape[2]

    def in_block(self, number: int, windowed: bool) -> Beside:
        return Beside(self.runs.of(windowed), self.source, self.blocks[number])

    def filled(self, multiple: int) -> Known:
        """With a run more, of at least one key: rows that are filled up have something to attend to."""
        more = multiple - self.source.shape[0] % multiple
        source, blocks, first = self.source, self.blocks, -self.num_first % multiple
        if first:  # stands between the first pass and the rows
            source = source + first * (source >= self.num_first)
            fill = (0, 0, 0, first)
            blocks = [[(F.pad(key, fill), F.pad(value, fill)) for key, value in its] for its in blocks]
        return Known(self.runs.filled(more), F.pad(source, (0, more)), blocks)

    def tensors(self) -> Iterator[Tensor]:
        """Those on the device."""
        yield from self.runs.tensors()
        yield self.source
        yield from (tensor for block in self.blocks for pair in block for tensor in pair)

    def held(self, tensors: Iterator[Tensor], multiple: int) -> Known:
        """Around other tensors, as `Runs.held`."""
        runs, source = self.runs.held(tensors, multiple), next(tensors)
        return Known(runs, source, [[(next(tensors), next(tensors)) for _ in block] for block in self.blocks])


@dataclass(frozen=True, eq=False)
class BlockInput:
    """What the first block reads, and all blocks beside their tokens.

    Attributes:
        x: (1, T, D) packed tokens or, without runs, a plain batch (B, L, D).
        rotation: Rotary embeddings of each, if the host has them.
        runs: Of the packed sequence.
        known: In the second of two passes.
    """

    x: Tensor
    rotation: Rotation | None
    runs: Runs | None = None
    known: Known | None = None

    def as_batch(self) -> BlockInput:
        """Images of one length, as a plain batch."""
        assert self.runs is not None
        images, turned = self.runs.images, self.rotation
        turned = None if turned is None else Rotation(rotation_of_batch(turned.globally, images))
        return BlockInput(images.to_batch(self.x[0]), turned)

    def filled(self, multiple: int) -> BlockInput:
        """Up to a multiple of tokens, by one run more; runs of one length that are a multiple stay as they are."""
        more, runs = -self.x.shape[1] % multiple, self.runs
        if runs is None or (more == 0 and self.known is None and runs.is_dense):
            return self
        fill, rotation = (0, 0, 0, more), self.rotation
        if rotation is not None:
            inside = None if rotation.in_windows is None else F.pad(rotation.in_windows, fill)
            rotation = Rotation(F.pad(rotation.globally, fill), inside)
        known = None if self.known is None else self.known.filled(multiple)
        return BlockInput(F.pad(self.x, fill), rotation, runs.filled(more), known)

    def tensors(self) -> Iterator[Tensor]:
        """Those on the device."""
        yield self.x
        if self.rotation is not None:
            yield from (one for one in (self.rotation.globally, self.rotation.in_windows) if one is not None)
        for part in (self.runs, self.known):
            if part is not None:
                yield from part.tensors()

    def held(self, tensors: Iterator[Tensor], multiple: int) -> BlockInput:
        """Around other tensors of the same shapes, with the same `key`; nothing of them is read on the host."""
        x, rotation = next(tensors), self.rotation
        if rotation is not None:
            rotation = Rotation(next(tensors), None if rotation.in_windows is None else next(tensors))
        runs = None if self.runs is None else self.runs.held(tensors, multiple)
        return BlockInput(x, rotation, runs, None if self.known is None else self.known.held(tensors, multiple))

    def key(self, multiple: int) -> Hashable:
        """What it has in common with others that it can be `held` for, besides shapes."""
        parts = [part for part in (self.runs, None if self.known is None else self.known.runs) if part is not None]
        # A plain batch to attention, at lengths that shapes tell.
        dense = tuple(packing.is_dense for part in parts for packing in part.packings)
        return (*(tuple(part.limits(multiple)) for part in parts), dense, self.known is None)


def rotation_of_batch(rotation: Tensor, packing: Packing) -> Tensor:
    """(T, R) -> (B, 1, L, R), the same for all heads; (depth, H, T, R) -> (depth, B, H, L, R)."""
    if rotation.ndim == 2:
        return packing.to_batch(rotation)[:, None]
    return packing.to_batch(rotation).transpose(0, 1)
