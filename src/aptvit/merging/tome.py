"""ToMe: similar tokens are merged, r in each block (Bolya et al., ICLR 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.merging.adaptive import ReducedAdaptive
from aptvit.merging.blocks import AttentionInputs, Reduction, at_least_float32
from aptvit.merging.matching import bipartite_matching, merge, most_mergeable
from aptvit.merging.reduced import ReducedTransformer, check_host
from aptvit.merging.settings import exclusive_setting, names_setting, setting_of_share
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["ToMe", "parse_r", "schedule_of", "token_schedule", "tome"]


@names_setting
def tome(
    model: nn.Module,
    r: int | tuple[int, float] | Sequence[int] | None = None,
    *,
    keep: float | None = None,
    prop_attn: bool = True,
) -> ReducedTransformer | ReducedAdaptive:
    """Merge r tokens into their most similar tokens in every block. Needs no training.

    Args:
        model: A timm VisionTransformer or DeiT, or an adaptive model of one with ``keep=``. Its parameters are shared,
            and it is not changed.
        r: Tokens to merge in each block, at most half of the tokens. ``(r, inflect)`` merges r on average, more in
            later blocks for ``inflect`` in (0, 1], more in earlier blocks for ``inflect`` in [-1, 0). A list has a
            number for each block; blocks beyond its end merge nothing. 8 by default.
        keep: Instead of r: the share of the patch tokens that enter a block, mean over the blocks, on images of the
            model's own size. The nearest whole r is taken. Not for an adaptive model.
        prop_attn: Proportional attention: add the logarithm of a token's size to its logits as a key. True is right for
            models that were trained with supervision; False allows flash kernels.

    Returns:
        The model, from (B, C, H, W) images to (B, num_classes) logits.

    Raises:
        ValueError: If r is not a valid number, pair or list, the share cannot be reached, or the model has other blocks
            than timm's Block and Attention.
    """
    if isinstance(model, AdaptivePatchTransformer):
        if keep is not None:
            raise ValueError(f"keep={keep!r} is of a uniform model: tome(aptvit.adapt(vit, keep=...), r=...)")
        vit = model.adapter.vit
        schedule = parse_r(len(vit.blocks), 8 if r is None else r)
        return ReducedAdaptive(model, ToMe(schedule, vit.num_prefix_tokens, prop_attn=prop_attn))
    host = check_host(model)
    schedule = schedule_of(host, r, keep)
    return ReducedTransformer(host, ToMe(schedule, host.num_prefix_tokens, prop_attn=prop_attn))


class ToMe(Reduction):
    """Merges the r best pairs of a bipartite matching by the keys of the block's own attention.

    Args:
        r: Tokens to merge, for each block.
        num_prefix_tokens: Class, distillation and register tokens in front: they are not merged.
        prop_attn: Proportional attention: add the logarithm of a token's size to its logits as a key.
    """

    def __init__(self, r: Sequence[int], num_prefix_tokens: int, *, prop_attn: bool = True) -> None:
        super().__init__()
        self.r = tuple(r)
        self.num_prefix_tokens = num_prefix_tokens
        self.prop_attn = prop_attn

    def forward(
        self, layer: int, x: Tensor, attended: AttentionInputs, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        r = min(self.r[layer], most_mergeable(x.shape[1], self.num_prefix_tokens))
        if r == 0:
            return x, size
        with torch.no_grad():
            matching = bipartite_matching(self.metric_of(layer, attended), r, self.num_prefix_tokens)
        return merge(x, size, matching)

    def metric_of(self, layer: int, attended: AttentionInputs) -> Tensor:
        """The features that tokens are compared by: the mean of keys over heads.

        Args:
            layer: Number of the block.
            attended: Inputs of the block's attention.

        Returns:
            (B, N, d), at least float32.
        """
        return attended.k.mean(dim=1, dtype=at_least_float32(attended.k.dtype))  # over heads

    def tokens_per_block(self, num_tokens: int) -> list[int]:
        return token_schedule(num_tokens, len(self.r), list(self.r), self.num_prefix_tokens)

    def extra_repr(self) -> str:
        return f"r={self.r}, num_prefix_tokens={self.num_prefix_tokens}, prop_attn={self.prop_attn}"


def schedule_of(host: Any, r: int | tuple[int, float] | Sequence[int] | None, keep: float | None) -> list[int]:
    """Tokens to merge in each block, from r or from a share of the tokens.

    Args:
        host: A timm VisionTransformer or DeiT.
        r: As for `tome`.
        keep: As for `tome`.

    Raises:
        ValueError: As for `tome`.
    """
    depth, prefix, num_patches = len(host.blocks), host.num_prefix_tokens, math.prod(host.patch_embed.grid_size)
    if (chosen := exclusive_setting("r", r, keep, 8)) is None:
        assert keep is not None
        numbers, num_tokens = range(num_patches // 2 + 1), prefix + num_patches
        per_block = partial(token_schedule, num_tokens, depth, num_prefix_tokens=prefix)
        chosen = setting_of_share("tome", numbers, per_block, keep, num_patches, prefix)
    return parse_r(depth, chosen)


def parse_r(depth: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """Tokens to merge in each block.

    Args:
        depth: Number of blocks.
        r: As for `tome`.

    Raises:
        ValueError: If r is not a number, a pair or a list of numbers that are 0 or more.
    """
    schedule: Any = r
    if isinstance(r, int):
        schedule = [r] * depth
    elif isinstance(r, tuple) and len(r) == 2:
        mean, inflect = r
        if not -1 <= inflect <= 1:
            raise ValueError(f"r={r!r}: the second number, inflect, must be in [-1, 1]; a list gives one r per block")
        first = int(mean * (1 - inflect))
        step = (2 * mean - 2 * first) / max(depth - 1, 1)
        schedule = [int(first + step * layer) for layer in range(depth)]
    if not isinstance(schedule, Sequence) or not all(isinstance(number, int) and number >= 0 for number in schedule):
        raise ValueError(f"r={r!r} must be the tokens to merge in each block: a whole number, 0 or more, or a list")
    if len(schedule) > depth:
        raise ValueError(f"r={r!r} has {len(schedule)} numbers for {depth} blocks: give at most one for each block")
    return [*schedule, *[0] * (depth - len(schedule))]


def token_schedule(
    num_tokens: int, depth: int, r: int | tuple[int, float] | Sequence[int], num_prefix_tokens: int = 1
) -> list[int]:
    """Tokens that enter each block, prefix tokens included.

    Args:
        num_tokens: Tokens that enter the first block.
        depth: Number of blocks.
        r: As for `tome`.
        num_prefix_tokens: Prefix tokens among them, which are not merged.

    Raises:
        ValueError: If r is not a valid number, pair or list.
    """
    entering = []
    for number in parse_r(depth, r):
        entering.append(num_tokens)
        num_tokens -= min(number, most_mergeable(num_tokens, num_prefix_tokens))
    return entering
