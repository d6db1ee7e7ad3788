"""A host's blocks with a reduction of tokens between attention and MLP.

    x = x + attention(norm1(x))
    x = reduction(x)                    # (B, N, D) -> (B, M, D), M <= N
    x = x + mlp(norm2(x))

Tokens may come from a host's patch embedding or from adaptive patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aptvit.layers.attention import class_of

__all__ = ["AttentionInputs", "Reduction", "at_least_float32", "check_blocks", "through_blocks"]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Inputs of the attention of a block, by which a reduction compares tokens.

    Attributes:
        normed: (B, N, D) normalised tokens.
        q: (B, H, N, d) queries.
        k: (B, H, N, d) keys.
    """

    normed: Tensor
    q: Tensor
    k: Tensor


class Reduction(nn.Module, ABC):
    """A reduction of tokens between the attention and the MLP of every block.

    All images lose the same number of tokens, so a batch stays a batch. ``size`` is the number of patches merged into
    each token, (B, N); None while all sizes are 1.
    """

    prop_attn = False

    @abstractmethod
    def forward(
        self, layer: int, x: Tensor, attended: AttentionInputs, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Reduce the tokens of one block.

        Args:
            layer: Number of the block.
            x: (B, N, D) tokens after attention.
            attended: Inputs of the attention.
            size: (B, N) sizes; None if all are 1.

        Returns:
            (B, M, D) tokens and their (B, M) sizes, or None.
        """

    def attention_bias(self, size: Tensor | None) -> Tensor | None:
        """Bias of the logits of keys: the logarithm of their size with ``prop_attn``, else None. (B, N) -> (B, N)"""
        return size.log() if self.prop_attn and size is not None else None

    @abstractmethod
    def tokens_per_block(self, num_tokens: int) -> list[int]:
        """Tokens that enter each block, prefix tokens included.

        Args:
            num_tokens: Tokens that enter the first block.
        """


def check_blocks(blocks: Iterable[nn.Module]) -> None:
    """Check that `through_blocks` can run blocks.

    Raises:
        ValueError: If a block is not timm's Block around timm's Attention.
    """
    for number, block in enumerate(blocks):
        name = type(block).__name__
        if type(block) is Block:
            if class_of(block.attn) is Attention:
                continue
            name = f"{name} with {type(block.attn).__name__}"
        raise ValueError(
            f"cannot reduce tokens inside this model: its block {number} is a {name}, supported is timm's Block with "
            "Attention. aptvit.merging.random and downscale take any block"
        )


def through_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    reduction: Reduction,
    size: Tensor | None = None,
    *,
    checkpointing: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run blocks with a reduction of tokens in each.

    Args:
        blocks: timm's blocks, as many as the reduction was made for.
        x: (B, N, D) tokens, prefix tokens first.
        reduction: The reduction between attention and MLP.
        size: (B, N) number of patches in each token; None if all are 1.
        checkpointing: Recompute each block in the backward pass instead of storing its activations.

    Returns:
        (B, M, D) tokens and their (B, M) sizes, None if all are 1.
    """
    run: Any = _run_block
    if checkpointing and torch.is_grad_enabled():
        run = partial(checkpoint, run, use_reentrant=False)
    for layer, block in enumerate(blocks):
        x, size = run(block, layer, x, reduction, size)
    return x, size


def _run_block(
    block: Any, layer: int, x: Tensor, reduction: Reduction, size: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """timm's Block.forward with the reduction between attention and MLP."""
    attention, attended = _attend(block.attn, block.norm1(x), reduction.attention_bias(size))
    x = x + block.drop_path1(block.ls1(attention))
    x, size = reduction(layer, x, attended, size)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


def _attend(attn: Any, normed: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """timm's Attention.forward (fused) with a (B, N) bias of keys, which also returns queries and keys."""
    heads = (3, attn.num_heads, attn.head_dim)
    q, k, v = attn.qkv(normed).unflatten(-1, heads).permute(2, 0, 3, 1, 4)  # (B, N, 3 H d) -> 3 of (B, H, N, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    # Flash kernels take no mask, so there is none while all sizes are 1.
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    x = attn.norm(x.transpose(1, 2).flatten(2))  # (B, H, N, d) -> (B, N, H d)
    if attn.gate is not None:
        x = x * attn.gate(normed).sigmoid()
    return attn.proj_drop(attn.proj(x)), AttentionInputs(normed, q, k)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type for similarities and sizes: half precision cannot distinguish close similarities, or 257 from 256."""
    return torch.promote_types(dtype, torch.float32)
