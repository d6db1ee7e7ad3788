"""timm's pooling, for images with different numbers of tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor

from aptvit.patching.features import PackedFeatures

__all__ = ["pool_ragged"]


def pool_ragged(vit: Any, features: PackedFeatures) -> Tensor:
    """Pool tokens as the host does, with any number of tokens per image. -> (B, D)

    Args:
        vit: A timm model.
        features: Normalised tokens of the last block.

    Raises:
        ValueError: If the host's pooling gives one row per token.
    """
    pool = getattr(vit, "attn_pool", None)
    # Attention pooling of Eva includes prefix tokens; that of VisionTransformer has an option.
    with_prefix = getattr(vit, "pool_include_prefix", pool is not None)
    if pool is not None and not isinstance(pool, AttentionPoolLatent):
        start = 0 if with_prefix else vit.num_prefix_tokens
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
