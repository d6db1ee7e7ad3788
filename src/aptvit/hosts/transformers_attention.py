"""Packed attention through transformers' registry of attention functions.

A model with the attention implementation "aptvit" attends as with "sdpa", masks included, except while
`aptvit.layers.attention.run_block` runs a block: then the current `AttentionHandler` computes packed attention. This
costs a quarter of intercepting all calls of PyTorch, which remains the fallback for hosts that do not use the registry;
`run_block` recognises them by the number of intercepted calls.
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
    """An attention function with the signature of transformers' registry.

    Args:
        module: The attention module of the host.
        query: (B, H, L, d) queries.
        key: (B, H', L, d) keys; H is a multiple of H'.
        value: (B, H', L, e) values.
        attention_mask: Mask, or bias of the logits, for each pair of query and key.
        dropout: Dropout of the attention weights.
        scaling: Factor of the logits.
        is_causal: Whether tokens attend only to earlier tokens.
        options: Further arguments of hosts.

    Returns:
        (B, L, H, e), and None for the attention weights, which are not computed.

    Raises:
        ValueError: If tokens are packed and the host passes a mask, or a bias for pairs of positions.
    """
    # In compiled code run_block intercepts all calls, at no cost.
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
    """Set the attention of a tower to `attention_forward`.

    Args:
        core: The tower, a copy: the configurations of its modules are changed.
        blocks: The blocks of the tower.
    """
    AttentionInterface.register(_NAME, attention_forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for module in core.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = _NAME
    for block in blocks:
        # The expected number of intercepted calls: attention modules have the attribute is_causal.
        block.num_redirected = sum(hasattr(module, "is_causal") for module in block.modules())  # type: ignore[assignment]
