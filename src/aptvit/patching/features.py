"""Outputs of the blocks as packed tokens, and their conversion to padded batches and feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aptvit.patching.layout import PatchLayout

__all__ = ["PackedFeatures"]


@dataclass(frozen=True, eq=False)
class PackedFeatures:
    """Packed tokens of a batch of images, with their layout.

    Attributes:
        tokens: (T, D), in the layout's order.
        layout: The patch of each token.
    """

    tokens: Tensor
    layout: PatchLayout

    def split(self) -> list[Tensor]:
        """(L_i, D) tokens of each image, prefix tokens first."""
        return list(self.tokens.split(self.layout.seqlens))

    def prefix(self) -> Tensor:
        """(B, P, D) prefix tokens."""
        return self.layout.prefix_of(self.tokens)

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor | None]:
        packing = self.layout.packing
        if packing.is_dense:
            return packing.to_batch(self.tokens), None
        starts, lengths = packing.cu_seqlens[:-1, None].long(), packing.cu_seqlens.diff()[:, None]
        step = torch.arange(self.layout.max_seqlen, device=self.tokens.device)
        valid = step < lengths  # (B, L)
        return self.tokens[(starts + step) * valid], valid

    def padded(self, include_prefix: bool = True) -> tuple[Tensor, Tensor | None]:
        """Tokens as a padded batch.

        Args:
            include_prefix: Whether prefix tokens stay at the front.

        Returns:
            (B, L, D) tokens, and a (B, L) mask that is False on padding, None where all images have the same length.
        """
        tokens, valid = self._padded
        start = 0 if include_prefix else self.layout.num_prefix_tokens
        return tokens[:, start:], None if valid is None else valid[:, start:]

    def feature_maps(self) -> Tensor | list[Tensor]:
        """Feature maps on the base grid: each token at every cell that its patch covers.

        Returns:
            (B, D, h, w), or a list of (D, h_i, w_i) where the images differ in size.
        """
        maps = self.tokens[self.layout.restore_index].permute(0, 3, 1, 2)  # (B, h, w, D) -> (B, D, h, w)
        grids = self.layout.grid_sizes
        if len(set(grids)) <= 1:
            return maps.contiguous()
        return [image[:, :rows, :cols].contiguous() for image, (rows, cols) in zip(maps, grids, strict=True)]

    def rows(self) -> Tensor | list[Tensor]:
        """`feature_maps` as rows of cells: (B, h w, D), or a list of (h_i w_i, D)."""
        maps = self.feature_maps()
        if isinstance(maps, Tensor):
            return maps.flatten(2).transpose(1, 2)
        return [image.flatten(1).transpose(0, 1) for image in maps]
