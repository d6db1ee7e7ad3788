"""timm's VisionTransformer, VisionTransformerDistilled and Eva: ViT, DeiT, EVA, DINOv2, DINOv3, CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.layers.drop import DropPath
from timm.models import get_model_args
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aptvit.hosts.adapter import coarse_positions, share_parameters
from aptvit.layers.attention import PackedDropPath
from aptvit.layers.features import PackedFeatures
from aptvit.layers.interception import redirect
from aptvit.layers.patch_embed import COARSE_PREFIX

__all__ = ["TimmAdapter", "reason_not_adaptable"]


def reason_not_adaptable(host: Any) -> str | None:
    """Why this model cannot run on adaptive patches, or None if it can."""
    name = type(host).__name__
    if not isinstance(host, (VisionTransformer, Eva)):
        return f"{name} is not one of timm's VisionTransformer, VisionTransformerDistilled and Eva"
    if type(host) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return f"{name} changes how a {type(host).__mro__[1].__name__} embeds or attends"
    embed = host.patch_embed
    if not isinstance(embed, PatchEmbed):
        return f"its patches are made by {type(embed).__name__}, not by one linear map of the pixels"
    if embed.patch_size[0] != embed.patch_size[1] or embed.proj.stride != embed.proj.kernel_size:
        return f"its patches of {embed.patch_size} are not square and side by side"
    if not isinstance(getattr(host, "patch_drop", None), (nn.Identity, type(None))):
        return "it drops patches at random in training (patch_drop_rate): build it with patch_drop_rate=0"
    attention = [m for m in host.blocks.modules() if hasattr(m, "fused_attn")]
    if len(attention) < len(host.blocks):
        return "its attention does not go through scaled_dot_product_attention"
    return None


class TimmAdapter:
    """Enters a timm model between its patch embedding and its blocks.

    Args:
        host: The model. It is not changed: the adapter works on a copy of its structure around the same parameters.

    Raises:
        ValueError: If the model cannot be adapted.
    """

    def __init__(self, host: nn.Module) -> None:
        reason = reason_not_adaptable(host)
        if reason is not None:
            raise ValueError(
                f"cannot adapt this model: {reason}. `aptvit models` lists what can be adapted, docs/models.md says why"
            )
        vit: Any = share_parameters(host)
        _prepare_blocks(vit)
        self.vit = vit
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.in_chans: int = vit.patch_embed.proj.in_channels
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        embed = vit.patch_embed
        self.cut_size: tuple[int, int] | None = None if embed.dynamic_img_pad else tuple(embed.img_size)
        config = getattr(host, "pretrained_cfg", None) or {}
        self.mean = tuple(config.get("mean", (0.5,) * self.in_chans))
        self.std = tuple(config.get("std", (0.5,) * self.in_chans))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.vit.blocks

    def patch_weight(self) -> tuple[Tensor, Tensor | None]:
        return self.vit.patch_embed.proj.weight, self.vit.patch_embed.proj.bias

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
            return vit.patch_embed.proj.weight.new_zeros(0, self.embed_dim)
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
        cached = getattr(rope, "feat_shape", None)
        if cached is None:
            return rope.get_embed(shape=grid_size)
        if grid_size == tuple(cached):
            return rope.get_embed()
        rope = share_parameters(rope)
        rope.update_feat_shape(type(cached)(grid_size))
        return rope.get_embed(shape=grid_size)

    def position_parameters(self) -> list[Tensor]:
        vit = self.vit
        names = ("pos_embed", "cls_token", "dist_token", "reg_token")
        parameters = [p for name in names if (p := getattr(vit, name, None)) is not None]
        return parameters + (list(vit.rope.parameters()) if getattr(vit, "rope", None) is not None else [])

    def positions_vary(self) -> bool:
        rope = getattr(self.vit, "rope", None)
        return rope is not None and rope.training and getattr(rope, "aug_active", False)

    def before_blocks(self, x: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit.pos_drop(x))

    def block_arguments(self, rotation: Tensor | None) -> list[dict[str, Any]]:
        if rotation is None:
            return [{}] * len(self.vit.blocks)
        if getattr(self.vit, "rope_mixed", False):  # (depth, H, T, 2 R): a rotation of its own for each block
            return [{"rope": one} for one in rotation]
        return [{"rope": rotation}] * len(self.vit.blocks)

    def norm(self, x: Tensor) -> Tensor:
        return self.vit.norm(x)

    def forward_head(self, features: PackedFeatures, pre_logits: bool) -> Tensor | tuple[Tensor, Tensor]:
        vit = self.vit
        if getattr(vit, "attn_pool", None) is None and vit.global_pool == "token":
            return vit.forward_head(features.prefix(), pre_logits=pre_logits)
        tokens, valid = features.padded()
        if valid is None:
            return vit.forward_head(tokens, pre_logits=pre_logits)
        x = vit.head_drop(vit.fc_norm(self._pool_ragged(features)))
        return x if pre_logits else vit.head(x)

    def _pool_ragged(self, features: PackedFeatures) -> Tensor:
        """The host's pooling for images with different numbers of tokens. -> (B, D)"""
        vit = self.vit
        pool = getattr(vit, "attn_pool", None)
        # Eva pools attentively over all tokens; VisionTransformer only when told to.
        with_prefix = getattr(vit, "pool_include_prefix", pool is not None)
        if pool is not None and not isinstance(pool, AttentionPoolLatent):
            start = 0 if with_prefix else self.num_prefix_tokens
            return torch.cat([pool(tokens[None, start:]) for tokens in features.split()])
        tokens, valid = features.padded(include_prefix=with_prefix)
        assert valid is not None
        if pool is not None:
            return pool(tokens, attn_mask=valid[:, None, None])
        mask = valid[..., None]
        mean = tokens.masked_fill(~mask, 0).sum(1) / mask.sum(1)
        if vit.global_pool == "avg":
            return mean
        largest = tokens.masked_fill(~mask, -torch.inf).amax(1)
        if vit.global_pool == "max":
            return largest
        if vit.global_pool == "avgmax":
            return 0.5 * (largest + mean)
        raise ValueError(
            f"global_pool={vit.global_pool!r} gives one row per token, and these images have different numbers of "
            "tokens: use forward_features, or reset_classifier(num_classes, global_pool='avg')"
        )

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        matcher = self.vit.group_matcher(coarse=coarse)
        return {**matcher, "stem": f"{matcher['stem']}|{COARSE_PREFIX}"}

    def host_config(self) -> dict[str, Any]:
        vit = self.vit
        config = getattr(vit, "pretrained_cfg", None) or {}
        if not config.get("architecture"):
            raise ValueError(
                "this host was not made by timm.create_model, so there is no name to build it from again: "
                "save model.state_dict() instead"
            )
        keep = ("tag", "mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode", "num_classes")
        return {
            "library": "timm",
            "architecture": config["architecture"],
            "model_args": get_model_args(vit),
            "pretrained_cfg": {key: config[key] for key in keep if config.get(key) is not None},
        }


def build_host(config: dict[str, Any]) -> nn.Module:
    """The host that `TimmAdapter.host_config` describes, with random weights."""
    return timm.create_model(
        config["architecture"],
        pretrained=False,
        pretrained_cfg_overlay=dict(config["pretrained_cfg"]),
        **config["model_args"],
    )


def _prepare_blocks(vit: Any) -> None:
    """Modifications: fused attention everywhere; rotary embeddings cover prefix rows; stochastic depth per image."""
    for module in list(vit.modules()):
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = True
        if hasattr(module, "rotate_half") and hasattr(module, "num_prefix_tokens"):
            module.num_prefix_tokens = 0
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, PackedDropPath(child.drop_prob, child.scale_by_keep))
    for block in vit.blocks:
        redirect(block)
