"""From chosen patches to the tokens that the first block reads: pixels, positions and prefix tokens in packed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aptvit.adapters.base import Adapter
from aptvit.embedding import CoarsePatchEmbed, PackedOrder, ParameterCache, coarse_rotation, patch_reader, resize_weight
from aptvit.inputs import ImageGroup
from aptvit.layout import PatchLayout
from aptvit.patchify import Patchifier

__all__ = ["Rotation", "TokenEmbedding"]


@dataclass(frozen=True)
class Rotation:
    """Rotary embeddings of the tokens of a packed sequence.

    Attributes:
        globally: (..., T, 2 R) sines and cosines of positions in the image.
        in_windows: The same of positions in the window, for blocks that attend inside it; None without windows.
    """

    globally: Tensor
    in_windows: Tensor | None = None

    def of_rows(self, rows: Tensor) -> Rotation:
        """Of some of the tokens."""
        inside = None if self.in_windows is None else self.in_windows.index_select(-2, rows)
        return Rotation(self.globally.index_select(-2, rows), inside)


class TokenEmbedding:
    """The embedding of one model. It keeps what follows from the parameters alone for as long as they do not change.

    Args:
        adapter: Has the host's patch embedding, positions and prefix tokens.
        patchifier: Knows how images are normalised.
    """

    def __init__(self, adapter: Adapter, patchifier: Patchifier) -> None:
        self.adapter = adapter
        self.patchifier = patchifier
        self._cache = ParameterCache()

    def clear(self) -> None:
        """Forget what was computed from parameters."""
        self._cache.clear()

    def __call__(
        self, groups: Sequence[ImageGroup], layout: PatchLayout, coarse: CoarsePatchEmbed | None
    ) -> tuple[Tensor, Rotation | None]:
        """Embed the chosen patches.

        Args:
            groups: The images by size.
            layout: Their layout.
            coarse: The sub-patch branch, if there is one.

        Returns:
            (1, T, D) tokens in packed order, and their rotary embeddings if the host has them.
        """
        if len(groups) == 1 and layout.is_uniform and not (torch.is_grad_enabled() or layout.window_packing):
            return self._uniform(groups[0], layout)
        adapter, order = self.adapter, PackedOrder(layout, groups)
        readers = [patch_reader(self.patchifier, group.images, adapter.patch_weight()[0].dtype) for group in groups]
        tables = [self._position_tables(layout.grid_sizes[group.index[0]], layout.num_scales) for group in groups]
        window = None if layout.window_packing is None else self.patchifier.window_size
        windows = [] if window is None else self._position_tables((window, window), layout.num_scales)
        rows: list[Tensor] = []
        rotations: list[Tensor] = []
        in_windows: list[Tensor] = []
        for scale in range(layout.num_scales):
            side = self.patchifier.patch_size << scale
            columns = [layout.grid_sizes[group.index[0]][1] >> scale for group in groups]
            pixels, positions = [], []
            stages = zip(readers, columns, tables, order.selections(scale), strict=True)
            for read, width, table, (image, row, col) in stages:
                pixels.append(read(image, row, col, side))
                cell = row * width + col
                absolute, rotary = table[scale]
                if absolute is not None:
                    positions.append(absolute.index_select(0, cell))
                if rotary is None:
                    continue
                rotations.append(rotary.index_select(-2, cell))
                if window is not None:
                    side_of_window = window >> scale
                    place = row % side_of_window * side_of_window + col % side_of_window
                    in_windows.append(_given(windows[scale][1]).index_select(-2, place))
            weight, bias = self._patch_map(coarse, scale)
            embedded = adapter.patch_norm(nn.functional.linear(_join(pixels), weight, bias))
            rows.append(embedded + _join(positions) if positions else embedded)
        source = order.source_of_row()
        prefix = adapter.prefix_tokens()
        dtype = rows[0].dtype
        x = torch.cat([prefix.to(dtype), *(row.to(dtype) for row in rows)])[None].index_select(1, source)
        if not rotations:
            return x, None
        still = _no_rotation(rotations[0], len(prefix))
        globally, inside = (
            torch.cat([still, *parts], dim=-2).index_select(-2, source) if parts else None
            for parts in (rotations, in_windows)
        )
        return x, Rotation(_given(globally), inside)

    def _uniform(self, group: ImageGroup, layout: PatchLayout) -> tuple[Tensor, Rotation | None]:
        """As `__call__`, where nothing is merged: the host's own convolution.

        Not with gradients: there the maps of coarse patches stay in the graph even if there are none, so that each
        parameter has a gradient on every worker.
        """
        adapter = self.adapter
        weight, bias = adapter.patch_weight()
        images = self.patchifier.normalised(group.images).to(weight.dtype)
        patches = (
            nn.functional.conv2d(images, weight, bias, stride=self.patchifier.patch_size).flatten(2).transpose(1, 2)
        )
        rows = adapter.patch_norm(patches)  # (B, N, D)
        absolute, rotary = self._position_tables(layout.grid_sizes[0], layout.num_scales)[0]
        if absolute is not None:
            rows = rows + absolute
        prefix = adapter.prefix_tokens().to(rows.dtype)
        batch = (layout.num_images, -1, -1)
        x = torch.cat([prefix.expand(batch), rows], dim=1).flatten(0, 1)[None]
        if rotary is None:
            return x, None
        one = torch.cat([_no_rotation(rotary, len(prefix)), rotary], dim=-2)  # (..., L, 2 R)
        return x, Rotation(one.repeat(*[1] * (one.ndim - 2), layout.num_images, 1))

    def _patch_map(self, coarse: CoarsePatchEmbed | None, scale: int) -> tuple[Tensor, Tensor | None]:
        """The one affine map of a scale: weight (D, C (2^scale p)^2) and bias."""
        weight, bias = self.adapter.patch_weight()
        if scale == 0:
            return weight.flatten(1), bias

        def compose() -> tuple[Tensor, Tensor | None]:
            with torch.autocast(weight.device.type, enabled=False):
                if coarse is None:
                    return resize_weight(weight, 2**scale).flatten(1), bias
                return coarse.compose(weight, bias, 2**scale)

        parameters = [weight, *([] if bias is None else [bias]), *([] if coarse is None else coarse.parameters())]
        return self._cache.get(("patch", scale), parameters, compose)

    def _position_tables(
        self, grid_size: tuple[int, int], num_scales: int
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """For each scale: absolute positions and rotary embedding of its complete patches."""

        def compute() -> list[tuple[Tensor | None, Tensor | None]]:
            rotation = self.adapter.rotation_table(grid_size)
            return [
                (
                    self.adapter.position_table(grid_size, 2**scale),
                    None if rotation is None else coarse_rotation(rotation, grid_size, 2**scale),
                )
                for scale in range(num_scales)
            ]

        if self.adapter.positions_vary():
            return compute()
        key = ("positions", grid_size, num_scales)
        return self._cache.get(key, self.adapter.position_parameters(), compute)


def _no_rotation(rotation: Tensor, num_rows: int) -> Tensor:
    """Rows for prefix tokens, which are not rotated: sine 0, cosine 1."""
    still = rotation.new_zeros(*rotation.shape[:-2], num_rows, rotation.shape[-1])
    still[..., rotation.shape[-1] // 2 :] = 1
    return still


def _given(rotary: Tensor | None) -> Tensor:
    assert rotary is not None  # a host has rotary embeddings of every grid, or of none
    return rotary


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
