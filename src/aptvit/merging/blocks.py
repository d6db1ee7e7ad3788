"""A host's blocks with a step between attention and MLP, where tokens become fewer.

    x = x + attention(norm1(x))
    x = reduction(x)                    # (B, N, D) -> (B, M, D), M <= N
    x = x + mlp(norm2(x))

Where the tokens come from does not matter here: a host's patch embedding, or adaptive patches of sizes 1 and 4.
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
    """What the attention of a block worked with, for a reduction to judge tokens by.

    Attributes:
        normed: (B, N, D) its input.
        q: (B, H, N, d) queries.
        k: (B, H, N, d) keys.
    """

    normed: Tensor
    q: Tensor
    k: Tensor


class Reduction(nn.Module, ABC):
    """What happens to the tokens between the attention and the MLP of every block.

    All images lose the same number of tokens, so a batch stays a batch. ``size`` is how many patches each token stands
    for, (B, N); None while every token stands for one.
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
            seen: What attention worked with.
            size: (B, N) sizes.

        Returns:
            (B, M, D) tokens and their (B, M) sizes.
        """

    def attention_bias(self, size: Tensor | None) -> Tensor | None:
        """(B, N) what is added to the logits of each key, so that a token counts as often as patches are in it."""
        return size.log() if self.prop_attn and size is not None else None

    @abstractmethod
    def tokens_per_block(self, num_tokens: int) -> list[int]:
        """Tokens that enter each block, prefix tokens included, if ``num_tokens`` enter the first."""


def check_blocks(blocks: Iterable[nn.Module]) -> None:
    """Refuse blocks that `through_blocks` cannot run.

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
    """Run tokens through blocks, with fewer of them from block to block.

    Args:
        blocks: timm's blocks, as many as the reduction was made for.
        x: (B, N, D) tokens, prefix tokens first.
        reduction: What happens between attention and MLP.
        size: (B, N) patches that each token stands for; None if each stands for one.
        checkpointing: Compute each block again in the backward pass instead of keeping its activations.

    Returns:
        (B, M, D) tokens and their (B, M) sizes, None if each stands for one.
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
    """timm's Block.forward, with the reduction in its middle."""
    attention, attended = _attend(block.attn, block.norm1(x), reduction.attention_bias(size))
    x = x + block.drop_path1(block.ls1(attention))
    x, size = reduction(layer, x, attended, size)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), size


def _attend(attn: Any, normed: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """timm's Attention.forward, fused, with its queries and keys kept and a bias for each key."""
    heads = (3, attn.num_heads, attn.head_dim)
    q, k, v = attn.qkv(normed).unflatten(-1, heads).permute(2, 0, 3, 1, 4)  # (B, N, 3 H d) -> 3 of (B, H, N, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    # Without a mask the flash kernels are open to it, so there is none while all sizes are one.
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    x = attn.norm(x.transpose(1, 2).flatten(2))  # (B, H, N, d) -> (B, N, H d)
    if attn.gate is not None:
        x = x * attn.gate(normed).sigmoid()
    return attn.proj_drop(attn.proj(x)), AttentionInputs(normed, q, k)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type to compare and count in: half precision cannot tell near neighbours apart, or 257 from 256."""
    return torch.promote_types(dtype, torch.float32)
