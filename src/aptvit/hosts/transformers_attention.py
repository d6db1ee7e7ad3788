"""Packed attention in transformers' own registry, under the same protocol as timm's redirected modules.

A model whose configuration names "aptvit" attends as with "sdpa" wherever no handler is current, masks included. While
`aptvit.layers.attention.run_block` runs a block, its handler answers, at a quarter of the cost of watching all calls of
PyTorch. Hosts that do not ask the registry are watched as before: the number of intercepted calls tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aptvit.layers.attention import current_handler

__all__ = ["attend_by_registry", "attention_forward"]

_NAME = "aptvit"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' registry calls it.

    Args:
        module: The attention module of the host.
        query: (B, H, L, d).
        key: (B, H', L, d); H is a multiple of H'.
        value: (B, H', L, e).
        attention_mask: What is added to the logits, or which keys are seen.
        dropout: Of the attention weights.
        scaling: Factor of the logits.
        is_causal: Whether tokens see only those before them.
        options: Further arguments of hosts.

    Returns:
        (B, L, H, e), and None for the attention weights, which are never formed.

    Raises:
        ValueError: If tokens are packed and the host asks for a mask or a bias of pairs of positions.
    """
    # What is compiled is watched: it has no calls that would cost.
    handler = None if torch.compiler.is_dynamo_compiling() else current_handler()
    if handler is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    for name in ("position_bias", "softcap"):
        if options.get(name) is not None:
            raise ValueError(f"packed attention has no {name}: {type(module).__name__} cannot run on packed tokens")
    out = handler.answer(query, key, value, attention_mask, dropout, bool(is_causal), scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def attend_by_registry(core: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Let a tower attend through `attention_forward`.

    Args:
        core: The tower; configurations of its modules are set, which are its own copies.
        blocks: Its blocks.
    """
    AttentionInterface.register(_NAME, attention_forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for module in core.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = _NAME
    for block in blocks:
        # Intercepted calls to expect: modules that attend say whether they are causal.
        block.num_redirected = sum(hasattr(module, "is_causal") for module in block.modules())  # type: ignore[assignment]
