"""timm's VisionTransformer, VisionTransformerDistilled and Eva: ViT, DeiT, EVA, DINOv2, DINOv3, CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.timm_host import TimmHost
from aptvit.hosts.timm_pooling import pool_ragged
from aptvit.patching.features import PackedFeatures

__all__ = ["TimmAdapter", "coarse_positions"]


class TimmAdapter(TimmHost):
    """The `aptvit.hosts.adapter.Adapter` of timm models; argument and errors as for `TimmHost`."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.vit.blocks

    @property
    def device(self) -> torch.device:
        return next(self.vit.patch_embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vit.patch_embed.parameters()).dtype

    def patch_embed(self, images: Tensor) -> Tensor:
        return self.vit.patch_embed.proj(images)

    def patch_norm(self, x: Tensor) -> Tensor:
        return self.vit.patch_embed.norm(x)

    @property
    def _num_prefix_positions(self) -> int:
        return 0 if self.vit.no_embed_class else self.num_prefix_tokens

    def prefix_tokens(self) -> Tensor:
        vit = self.vit
        names = ("cls_token", "dist_token", "reg_token")
        tokens = [token[0] for name in names if (token := getattr(vit, name, None)) is not None]
        if not tokens:
            return torch.zeros(0, self.embed_dim, device=self.device, dtype=self.dtype)
        prefix = torch.cat(tokens)  # (P, D)
        if vit.pos_embed is not None and self._num_prefix_positions:
            prefix = prefix + vit.pos_embed[0, : self.num_prefix_tokens]
        return prefix

    def position_table(self, grid_size: tuple[int, int], factor: int) -> Tensor | None:
        if self.vit.pos_embed is None:
            return None
        table = self.vit.pos_embed[:, self._num_prefix_positions :]
        return coarse_positions(table, tuple(self.vit.patch_embed.grid_size), grid_size, factor)

    def rotation_table(self, grid_size: tuple[int, int]) -> Tensor | None:
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return None
        native = getattr(rope, "feat_shape", None)  # some classes cache the embeddings of one grid
        if native is not None and grid_size != tuple(native):
            rope = share_parameters(rope)
            rope.update_feat_shape(type(native)(grid_size))
        return rope.get_embed(None if native is not None and grid_size == tuple(native) else grid_size)

    def position_parameters(self) -> list[Tensor]:
        rope = getattr(self.vit, "rope", None)
        absolute = [] if self.vit.pos_embed is None else [self.vit.pos_embed]
        return absolute if rope is None else [*absolute, *rope.parameters(), *rope.buffers()]

    def positions_vary(self) -> bool:
        rope = getattr(self.vit, "rope", None)
        return rope is not None and rope.training and getattr(rope, "aug_active", False)

    def before_blocks(self, x: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit.pos_drop(x))

    def block_arguments(self, rotation: Tensor | None) -> list[dict[str, Any]]:
        if rotation is None:
            return [{}] * len(self.vit.blocks)
        if getattr(self.vit, "rope_mixed", False):  # (depth, H, T, 2 R): a rotation for each block
            return [{"rope": table} for table in rotation]
        return [{"rope": rotation}] * len(self.vit.blocks)

    def norm(self, x: Tensor) -> Tensor:
        return self.vit.norm(x)

    def forward_head(self, features: PackedFeatures, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        vit = self.vit
        if getattr(vit, "attn_pool", None) is None and vit.global_pool == "token":
            return vit.forward_head(features.layout.prefix_of(features.tokens), pre_logits=pre_logits)
        tokens, valid = features.padded()
        if valid is None:
            return vit.forward_head(tokens, pre_logits=pre_logits)
        x = vit.head_drop(vit.fc_norm(pool_ragged(vit, features)))
        return x if pre_logits else vit.head(x)


def coarse_positions(table: Tensor, native: tuple[int, int], grid_size: tuple[int, int], factor: int) -> Tensor:
    """Absolute positions of the complete patches of a grid, as timm resamples them (bicubic, antialiased).

    Args:
        table: (1, cells, D) positions of the host's own grid.
        native: (rows, columns) of the host's own grid.
        grid_size: (rows, columns) of base patches of the images.
        factor: Base patches along a side of a coarse patch.

    Returns:
        (cells, D).
    """
    resample = partial(resample_abs_pos_embed, num_prefix_tokens=0)
    rows, cols = grid_size[0] // factor, grid_size[1] // factor
    if grid_size == (rows * factor, cols * factor):
        return resample(table, new_size=(rows, cols), old_size=native)[0]
    if rows * cols == 0:
        return table[0, :0]
    # Coarse patches do not reach the edge: resample only the cells that they cover, so that they stay aligned.
    grid = resample(table, new_size=grid_size, old_size=native).unflatten(1, grid_size)
    covered = grid[:, : rows * factor, : cols * factor]
    return resample(covered.flatten(1, 2), new_size=(rows, cols), old_size=covered.shape[1:3])[0]
