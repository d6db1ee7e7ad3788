"""Which of timm's models can be adapted; their preparation for packed tokens, configuration and rebuilding."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import PatchEmbed, RotaryEmbeddingDinoV3
from timm.layers.drop import DropPath
from timm.models import get_model_args
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from aptvit.hosts.adapter import share_parameters
from aptvit.layers.attention import redirect
from aptvit.layers.drop_path import PackedDropPath
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.layers.rotary import RelativePositions

__all__ = ["TimmHost", "build_host", "reason_not_adaptable", "relative_positions"]


def reason_not_adaptable(host: Any) -> str | None:
    """The reason why a model cannot run on adaptive patches; None if it can."""
    name = type(host).__name__
    if isinstance(host, NaFlexVit):
        return _reason_of_naflex(host)
    if not isinstance(host, (VisionTransformer, Eva)):
        return f"{name} is not one of timm's VisionTransformer, VisionTransformerDistilled, Eva and NaFlexVit"
    if type(host) not in (VisionTransformer, VisionTransformerDistilled, Eva):
        return f"{name} changes how a {type(host).__mro__[1].__name__} embeds or attends"
    embed = host.patch_embed
    if not isinstance(embed, PatchEmbed):
        return f"its patches are made by {type(embed).__name__}, not by one linear map of the pixels"
    if embed.patch_size[0] != embed.patch_size[1] or not _is_tiling(embed.proj):
        return f"its patches of {embed.patch_size} are not square and side by side"
    if not isinstance(getattr(host, "patch_drop", None), (nn.Identity, type(None))):
        return "it drops patches at random in training (patch_drop_rate): build it with patch_drop_rate=0"
    attention = [m for m in host.blocks.modules() if hasattr(m, "fused_attn")]
    if len(attention) < len(host.blocks):
        return "its attention does not go through scaled_dot_product_attention"
    return None


def _reason_of_naflex(host: NaFlexVit) -> str | None:
    """The same for NaFlexVit, whose patches are rows."""
    embeds: Any = host.embeds
    if embeds.patch_size[0] != embeds.patch_size[1]:
        return f"its patches of {embeds.patch_size} are not square"
    if embeds.norm_input is not None:
        return "it normalises the pixels of each patch, which is not a linear map of the pixels"
    if host.patch_drop is not None:
        return "it drops patches at random in training (patch_drop_rate): build it with patch_drop_rate=0"
    if type(host.rope).__name__ == "RotaryEmbeddingMRope":
        return "its rotary embedding has sections for time and both sides (mrope)"
    attention = [m for m in host.blocks.modules() if hasattr(m, "fused_attn")]
    if len(attention) < len(host.blocks):
        return "its attention does not go through scaled_dot_product_attention"
    return None


def _is_tiling(projection: Any) -> bool:
    """Whether the patches of a convolution, or of an adapter (LoRA) around it, neither overlap nor leave gaps."""
    while hasattr(projection, "base_layer"):
        projection = projection.base_layer
    return getattr(projection, "stride", None) == getattr(projection, "kernel_size", None)


class TimmHost:
    """A copy of a host's structure with the same parameters, prepared for packed tokens.

    Args:
        host: The model. It is not changed.

    Attributes:
        vit: The copy.
        patch_size: Side of a base patch in pixels.
        in_chans: Channels of the images.
        embed_dim: Width of the tokens.
        num_prefix_tokens: Class and register tokens.
        cut_size: (H, W) of images whose incomplete patches are cut off.
        mean: (C,) mean that images are normalised with, of pixels in [0, 1].
        std: (C,) standard deviation that images are normalised with.

    Raises:
        ValueError: If the model cannot be adapted.
    """

    def __init__(self, host: nn.Module) -> None:
        reason = reason_not_adaptable(host)
        if reason is not None:
            raise ValueError(
                f"cannot adapt this model: {reason}. `aptvit models` lists what can be adapted, "
                "docs/reference/models.md says why"
            )
        vit: Any = share_parameters(host)
        _prepare_blocks(vit)
        self.vit = vit
        self.embed_dim: int = vit.embed_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self.has_rotation = getattr(vit, "rope", None) is not None
        self.relative_positions = relative_positions(getattr(vit, "rope", None))
        self._read_embedding(vit)
        config = getattr(host, "pretrained_cfg", None) or {}
        self.mean = tuple(config.get("mean", (0.5,) * self.in_chans))
        self.std = tuple(config.get("std", (0.5,) * self.in_chans))

    def _read_embedding(self, vit: Any) -> None:
        embed = vit.patch_embed
        self.patch_size: int = embed.patch_size[0]
        self.in_chans: int = vit.in_chans
        self.cut_size: tuple[int, int] | None = None if embed.dynamic_img_pad else tuple(embed.img_size)

    def group_matcher(self, coarse: bool) -> dict[str, Any]:
        """The host's layer groups; new parameters belong to the stem."""
        matcher = self.vit.group_matcher(coarse=coarse)
        return {**matcher, "stem": f"{matcher['stem']}|{COARSE_PREFIX}"}

    def host_config(self) -> dict[str, Any]:
        """Configuration for `build_host`; JSON.

        Raises:
            ValueError: If the host was not made by ``timm.create_model``.
        """
        vit = self.vit
        config = getattr(vit, "pretrained_cfg", None) or {}
        if not config.get("architecture"):
            raise ValueError(
                "this host was not made by timm.create_model, so there is no name to build it from again: "
                "save model.state_dict() instead"
            )
        return {
            "library": "timm",
            "architecture": config["architecture"],
            "model_args": get_model_args(vit),
            "pretrained_cfg": {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None},
        }


def relative_positions(rope: Any) -> RelativePositions | None:
    """How rotary positions depend on the image; None for positions that are counted in patches."""
    if isinstance(rope, RotaryEmbeddingDinoV3):  # 4 pi over the number of rows between neighbours
        return RelativePositions(0.5, 5)
    if getattr(rope, "ref_feat_shape", None) is None or rope.grid_type != "index":
        return None
    return RelativePositions(rope.grid_offset, max(rope.ref_feat_shape) // 3 + 1)  # at most a radian in the reference


_CONFIG_KEYS = ("tag", "mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode", "num_classes")
_SOURCES = frozenset(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"))


def build_host(config: dict[str, Any]) -> nn.Module:
    """Build a host from `TimmHost.host_config`, with random weights.

    Raises:
        ValueError: If it names no model of timm, but a place to load one from.
    """
    name, arguments = config["architecture"], config["model_args"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}"[:200])
    if arguments.keys() & _SOURCES:
        raise ValueError(f"model_args must not have {min(arguments.keys() & _SOURCES)}")
    overlay = {key: value for key, value in config["pretrained_cfg"].items() if key in _CONFIG_KEYS}
    return timm.create_model(name, pretrained=False, pretrained_cfg_overlay=overlay, **arguments)


def _prepare_blocks(vit: Any) -> None:
    """Modify blocks in place: fused attention; rotary embeddings of prefix rows too; stochastic depth per image."""
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
