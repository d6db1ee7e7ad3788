"""ViTs of torchvision and open_clip as timm's VisionTransformer, which computes the same: both share the memory of the
weights, so that what is trained or loaded in one is so in the other."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

__all__ = ["as_timm", "reason_not_convertible"]

_NAME = "vit_base_patch16_224"  # built with the sizes of the host


def reason_not_convertible(host: Any) -> str | None:
    """The reason why a model is not the same as one of timm's; None if it is."""
    name, library = type(host).__name__, type(host).__module__.split(".")[0]
    if name != "VisionTransformer":
        return f"{name} of {library} is not its VisionTransformer"
    blocks = _blocks(host)
    if library == "torchvision":
        if not isinstance(host.conv_proj, nn.Conv2d):
            return "its patches are made by a stem of several convolutions"
        return None if len(host.heads) == 1 else "its head has more than one layer (representation_size)"
    attention = [getattr(block, "attn", None) for block in blocks]
    if any(type(block).__name__ != "ResidualAttentionBlock" for block in blocks):
        return f"its blocks are {type(blocks[0]).__name__}, not ResidualAttentionBlock"
    if any(type(part) is not nn.MultiheadAttention for part in attention):
        return "its attention is not torch.nn.MultiheadAttention"
    if host.attn_pool is not None or host.pool_type not in ("tok", "avg"):
        return "it pools tokens by attention, or not at all"
    if host.output_tokens:
        return "it returns tokens beside features: build it with output_tokens=False"
    if not isinstance(host.patch_dropout, nn.Identity):
        return "it drops patches at random in training (patch_dropout)"
    return None if host.patch_size[0] == host.patch_size[1] else f"its patches of {host.patch_size} are not square"


def _blocks(host: Any) -> list[Any]:
    of_torchvision = hasattr(host, "conv_proj")
    return list(host.encoder.layers if of_torchvision else host.transformer.resblocks)


def as_timm(host: Any) -> Any:
    """timm's VisionTransformer with the weights of a host of torchvision or open_clip.

    Args:
        host: A VisionTransformer of either.

    Raises:
        ValueError: If timm has no model that computes the same.
    """
    reason = reason_not_convertible(host)
    if reason is not None:
        raise ValueError(
            f"cannot adapt this model: {reason}. Models of timm and transformers, and the VisionTransformer of "
            "torchvision and of open_clip, can be adapted (docs/hosts.md)"
        )
    vit = (_of_torchvision if hasattr(host, "conv_proj") else _of_open_clip)(host)
    for block, source in zip(vit.blocks, _blocks(host), strict=True):
        attention = source.self_attention if hasattr(source, "self_attention") else source.attn
        first, second = (part for part in source.mlp if isinstance(part, nn.Linear))
        _share(block.norm1, source.ln_1)
        _share(block.attn.qkv, weight=attention.in_proj_weight, bias=attention.in_proj_bias)
        _share(block.attn.proj, attention.out_proj)
        _share(block.norm2, source.ln_2)
        _share(block.mlp.fc1, first)
        _share(block.mlp.fc2, second)
        block.mlp.act = source.mlp[1]
        for scale, layer in (("ls1", "ls_1"), ("ls2", "ls_2")):
            if hasattr(getattr(source, layer, None), "gamma"):
                getattr(block, scale).gamma = getattr(source, layer).gamma
    vit.train(host.training)
    return vit


def _build(**options: Any) -> Any:
    """A model of timm without memory, whose weights are to be those of the host."""
    with torch.device("meta"):
        return timm.create_model(_NAME, **options)


def _of_torchvision(host: Any) -> Any:
    vit = _build(
        img_size=host.image_size,
        patch_size=host.patch_size,
        embed_dim=host.hidden_dim,
        depth=len(host.encoder.layers),
        num_heads=host.encoder.layers[0].num_heads,
        mlp_ratio=host.mlp_dim / host.hidden_dim,
        num_classes=host.heads[-1].out_features,
        pos_drop_rate=host.dropout,
        proj_drop_rate=host.dropout,
        attn_drop_rate=host.attention_dropout,
        pretrained_cfg_overlay=_statistics(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    )
    _share(vit.patch_embed.proj, host.conv_proj)
    vit.cls_token, vit.pos_embed = host.class_token, host.encoder.pos_embedding
    _share(vit.norm, host.encoder.ln)
    _share(vit.head, host.heads[-1])
    return vit


def _of_open_clip(host: Any) -> Any:
    block, config = host.transformer.resblocks[0], getattr(host, "preprocess_cfg", None) or {}
    after = host.final_ln_after_pool
    vit = _build(
        img_size=host.image_size,
        patch_size=host.patch_size[0],
        embed_dim=host.conv1.out_channels,
        depth=len(host.transformer.resblocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.c_fc.out_features / host.conv1.out_channels,
        num_classes=0 if host.proj is None else host.proj.shape[1],
        global_pool="token" if host.pool_type == "tok" else "avg",
        fc_norm=after,
        pre_norm=not isinstance(host.ln_pre, nn.Identity),
        init_values=1.0 if hasattr(block.ls_1, "gamma") else None,
        pretrained_cfg_overlay=_statistics(config.get("mean", OPENAI_CLIP_MEAN), config.get("std", OPENAI_CLIP_STD)),
    )
    _share(vit.patch_embed.proj, weight=host.conv1.weight, bias=None)
    vit.cls_token = _viewed(host.class_embedding, host.class_embedding.data[None, None])
    vit.pos_embed = _viewed(host.positional_embedding, host.positional_embedding.data[None])
    if not isinstance(host.ln_pre, nn.Identity):
        _share(vit.norm_pre, host.ln_pre)
    _share(vit.fc_norm if after else vit.norm, host.ln_post)
    if host.proj is not None:
        _share(vit.head, weight=_viewed(host.proj, host.proj.data.T), bias=None)
    return vit


def _statistics(mean: Any, std: Any) -> dict[str, Any]:
    return {"mean": tuple(mean), "std": tuple(std)}


def _viewed(parameter: Tensor, view: Tensor) -> nn.Parameter:
    """A parameter of another shape with the memory of a parameter."""
    return nn.Parameter(view, requires_grad=parameter.requires_grad)


def _share(target: Any, source: Any = None, **parameters: Any) -> None:
    """Let a module have the parameters of another, or these; and its epsilon, if it is a normalisation."""
    if source is not None:
        parameters = {"weight": source.weight, "bias": source.bias}
        if hasattr(source, "eps"):
            target.eps = source.eps
    for name, parameter in parameters.items():
        setattr(target, name, parameter)
