"""timm's NaFlexVit: patches as rows, images of any size and shape, also the other models built with use_naflex=True."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.hosts.timm import TimmAdapter, coarse_positions
from aptvit.patching.features import PackedFeatures

__all__ = ["NaFlexAdapter", "images_of_patches"]


class NaFlexAdapter(TimmAdapter):
    """The `aptvit.hosts.adapter.Adapter` of NaFlexVit.

    Args:
        host: The model. It is not changed.

    Raises:
        ValueError: If the model cannot be adapted.
    """

    def _read_embedding(self, vit: Any) -> None:
        embeds = vit.embeds
        self.patch_size, self.in_chans, self.cut_size = embeds.patch_size[0], embeds.in_chans, None
        # The embeddings without dropout; parameters and modules are the same objects.
        self._embeds = copy.copy(embeds)
        self._embeds.__dict__["_modules"] = {**embeds.__dict__["_modules"], "pos_drop": nn.Identity()}

    @property
    def device(self) -> torch.device:
        return next(self.vit.embeds.proj.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vit.embeds.proj.parameters()).dtype

    def patch_embed(self, images: Tensor) -> Tensor:
        embeds = self.vit.embeds
        if not embeds.is_linear:
            return embeds.proj(images)
        side = self.patch_size
        cells = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, C, h, p, w, p)
        order = (0, 2, 4, 3, 5, 1) if embeds.channels_last else (0, 2, 4, 1, 3, 5)
        return embeds.proj(cells.permute(order).flatten(3)).permute(0, 3, 1, 2)

    def patch_norm(self, x: Tensor) -> Tensor:
        return self.vit.embeds.norm(x)

    def prefix_tokens(self) -> Tensor:
        tokens = [token[0] for token in (self.vit.embeds.cls_token, self.vit.embeds.reg_token) if token is not None]
        return torch.cat(tokens) if tokens else torch.zeros(0, self.embed_dim, device=self.device, dtype=self.dtype)

    def position_table(self, grid_size: tuple[int, int], factor: int) -> Tensor | None:
        embeds = self.vit.embeds
        if embeds.pos_embed_type == "none":
            return None
        height, width = (side * self.patch_size for side in grid_size)
        black = torch.zeros(1, self.in_chans, height, width, device=self.device, dtype=self.dtype)
        # What the host itself makes of a black image, without its embedding of black: the positions.
        with torch.autocast(self.device.type, enabled=False):
            plain = self.patch_norm(self.patch_embed(black[:, :, : self.patch_size, : self.patch_size]).flatten())
            table = self._embeds(black)[0][:, self.num_prefix_tokens :] - plain  # (1, h w, D)
        return table[0] if factor == 1 else coarse_positions(table, grid_size, grid_size, factor)

    def rotation_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        return None if self.vit.rope is None else self.vit.rope.get_embed(shape=grid_size)

    def position_parameters(self) -> list[Tensor]:
        embeds, rope = self.vit.embeds, self.vit.rope
        tables = [getattr(embeds, name) for name in ("pos_embed", "pos_embed_y", "pos_embed_x")]
        absolute = [table for table in tables if table is not None]
        return absolute if rope is None else [*absolute, *rope.parameters(), *rope.buffers()]

    def before_blocks(self, x: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit.embeds.pos_drop(x))

    def block_arguments(self, rotation: Tensor | None) -> list[dict[str, Any]]:
        if rotation is not None and self.vit.rope_is_mixed:  # (depth, H, T, 2 R): a rotation for each block
            return [{"rope": table} for table in rotation]
        return super().block_arguments(rotation)

    def forward_head(self, features: PackedFeatures, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        tokens, valid = features.padded()
        return self.vit.forward_head(tokens, pre_logits, None if valid is None else valid[:, self.num_prefix_tokens :])


def images_of_patches(batch: dict[str, Tensor], patch_size: int, channels: int, channels_last: bool) -> list[Tensor]:
    """The images that rows of patches were cut from.

    Args:
        batch: ``patches`` (B, N, p p C) or (B, N, p, p, C), ``patch_coord`` (B, N, 2) with row and column, and
            ``patch_valid`` (B, N), as timm's NaFlex collator makes them.
        patch_size: Side of a patch in pixels.
        channels: Channels of the images.
        channels_last: Whether the channel of a row varies fastest.

    Returns:
        (C, H_i, W_i) for each image.

    Raises:
        ValueError: If a part is missing, patches are of another size, or do not fill their grid.
    """
    missing = [name for name in ("patches", "patch_coord", "patch_valid") if batch.get(name) is None]
    if missing:
        raise ValueError(f"a batch of patches needs {', '.join(missing)}: give what timm's NaFlex collator made")
    patches, coordinates, valid = batch["patches"].flatten(2), batch["patch_coord"], batch["patch_valid"].bool()
    if patches.shape[2] != patch_size * patch_size * channels:
        raise ValueError(
            f"patches of {patches.shape[2]} values are not {channels} x {patch_size} x {patch_size} pixels"
        )
    ends = torch.cat([coordinates.masked_fill(~valid[..., None], -1).amax(1) + 1, valid.sum(1)[:, None]], dim=1)
    images = []
    for image, (rows, cols, count) in enumerate(ends.tolist()):
        if rows * cols != count:
            raise ValueError(f"image {image} has {count} patches on a grid of {rows}x{cols}: give all of them")
        order = (coordinates[image, :, 0] * cols + coordinates[image, :, 1])[valid[image]].argsort()
        cells = patches[image, valid[image]][order].unflatten(0, (rows, cols))  # (h, w, p p C)
        if channels_last:
            cells = cells.unflatten(2, (patch_size, patch_size, channels)).permute(4, 0, 2, 1, 3)
        else:
            cells = cells.unflatten(2, (channels, patch_size, patch_size)).permute(2, 0, 3, 1, 4)
        images.append(cells.reshape(channels, rows * patch_size, cols * patch_size))
    return images
