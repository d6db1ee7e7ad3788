"""What a first pass through the blocks leaves for a second one, see `aptvit.encoder.passes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aptvit.patching.images import ImageGroup

__all__ = ["FirstPass", "LeftByBlock"]


@dataclass(frozen=True, eq=False)
class LeftByBlock:
    """What a block left.

    Attributes:
        keys_values: (1, H, T, d) keys and (1, H, T, e) values, of each attention in it.
        out: (1, T, D) its output.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    out: Tensor

    @classmethod
    def of_tensors(cls, out: Tensor, keys_values: Sequence[Tensor]) -> LeftByBlock:
        """Of keys and values one after the other."""
        return cls(list(zip(keys_values[::2], keys_values[1::2], strict=True)), out)


@dataclass(frozen=True, eq=False)
class FirstPass:
    """What the first pass left.

    Attributes:
        position: (B, max rows, max columns) place in the first pass of the token that covers each base cell.
        blocks: What each block left.
        window_size: Side in base patches of the windows that it attended inside of.
        learned: Whether gradients go back into it, so that it serves one step of training.
    """

    position: Tensor
    blocks: list[LeftByBlock]
    window_size: int | None
    learned: bool = False

    @classmethod
    def of_groups(cls, passes: Sequence[FirstPass | None], groups: Sequence[ImageGroup]) -> FirstPass | None:
        """One for a whole batch, of those of its images by size; None for images too small to have one."""
        there = [(its, group) for its, group in zip(passes, groups, strict=True) if its is not None]
        if not there:
            return None
        if len(groups) == 1:
            return there[0][0]
        firsts = [first for first, _ in there]
        sides = [max(first.position.shape[dim] for first in firsts) for dim in (1, 2)]
        num_images = sum(len(group.index) for group in groups)
        position, start = firsts[0].position.new_zeros(num_images, *sides), 0
        for first, group in there:
            rows, cols = first.position.shape[1:]
            position[group.index, :rows, :cols] = first.position + start
            start += first.num_tokens
        blocks = [_joined(its) for its in zip(*(first.blocks for first in firsts), strict=True)]
        return cls(position, blocks, firsts[0].window_size, firsts[0].learned)

    @property
    def num_tokens(self) -> int:
        return self.blocks[0].out.shape[1]

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        yield self.position
        for block in self.blocks:
            yield block.out
            for pair in block.keys_values:
                yield from pair


def _joined(parts: Sequence[LeftByBlock]) -> LeftByBlock:
    pairs = zip(*(part.keys_values for part in parts), strict=True)
    keys_values = [(torch.cat([k for k, _ in pair], dim=2), torch.cat([v for _, v in pair], dim=2)) for pair in pairs]
    return LeftByBlock(keys_values, torch.cat([part.out for part in parts], dim=1))
