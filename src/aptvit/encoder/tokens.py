"""From chosen patches to the tokens that the first block reads: pixels, positions and prefix tokens in packed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aptvit.hosts.adapter import Adapter
from aptvit.layers.patch_embed import CoarsePatchEmbed, PackedOrder, ParameterCache, patch_reader, resize_weight
from aptvit.layers.position_embed import Positions, coarse_rotation, no_rotation
from aptvit.patching.images import ImageGroup
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier

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
        rows: list[Tensor] = []
        for scale in range(layout.num_scales):
            side = self.patchifier.patch_size << scale
            pixels = [read(*which, side) for read, which in zip(readers, order.selections(scale), strict=True)]
            rows.append(adapter.patch_norm(nn.functional.linear(_join(pixels), *self._patch_map(coarse, scale))))
        absolute, rotation = self._positions_of_tokens(groups, order)
        # As precise as what is added: under autocast the linear maps alone are in half precision.
        dtype = rows[0].dtype if absolute is None else torch.promote_types(rows[0].dtype, absolute.dtype)
        x = torch.cat([one.to(dtype) for one in (adapter.prefix_tokens(), *rows)]).index_select(
            0, order.source_of_row()
        )
        return (x if absolute is None else x + absolute)[None], rotation

    def _positions_of_tokens(
        self, groups: Sequence[ImageGroup], order: PackedOrder
    ) -> tuple[Tensor | None, Rotation | None]:
        """(T, D) absolute positions, and rotary embeddings, if the host has them."""
        layout, absolute, inside = order.layout, None, None
        grids = [layout.grid_sizes[group.index[0]] for group in groups]
        positions = Positions.joined([self._positions(grid, layout.num_scales) for grid in grids])
        if positions.absolute is None and positions.rotary is None:
            return None, None
        place = order.of_tokens(positions.place)
        if positions.absolute is not None:
            absolute = positions.absolute.index_select(0, place)
        if positions.rotary is None:
            return absolute, None
        if layout.window_packing is not None:
            window = self.patchifier.window_size
            assert window is not None
            its = self._positions((window, window), layout.num_scales)
            tiled = Positions.joined([its.tiled(rows // window, cols // window) for rows, cols in grids])
            inside = _given(tiled.rotary).index_select(-2, order.of_tokens(tiled.place))
        return absolute, Rotation(positions.rotary.index_select(-2, place), inside)

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
        one = torch.cat([no_rotation(rotary, len(prefix)), rotary], dim=-2)  # (..., L, 2 R)
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

    def _positions(self, grid_size: tuple[int, int], num_scales: int) -> Positions:
        """Of patches on one grid."""
        device = self.adapter.patch_weight()[0].device

        def join() -> Positions:
            return Positions.of_scales(self._position_tables(grid_size, num_scales), grid_size, device)

        if self.adapter.positions_vary():
            return join()
        key = ("joined positions", grid_size, num_scales)
        return self._cache.get(key, self.adapter.position_parameters(), join)

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


def _given(rotary: Tensor | None) -> Tensor:
    assert rotary is not None  # a host has rotary embeddings of every grid, or of none
    return rotary


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
