"""Merging that can be learned: DTEM's relaxation of ToMe, in which nothing leaves (Lee & Hong, NeurIPS 2024).

Each token has a weight. Merging moves a part of the weight of some tokens of A to their neighbours in B, as much as a
relaxed choice of the r best pairs says. Tokens are kept in the order of their weight; those beyond the number that hard
merging would have left are weightless or nearly so, and take no part in later matchings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.merging.blocks import at_least_float32

__all__ = ["relaxed_pairs", "soft_merge"]

_NEIGHBOURS = 3  # k2 of the recipe
_TEMPERATURE_OF_SCORES = 0.1  # tau1
_TEMPERATURE_OF_CHOICE = 0.1  # tau2


def relaxed_pairs(scores: Tensor, r: int) -> Tensor:
    """A relaxed choice of r pairs, no two from one row: r times a softmax over all pairs, each time without what the
    times before have chosen.

    Args:
        scores: (B, n, m) similarity of each token of A to each of B.
        r: Pairs to choose.

    Returns:
        (B, n, m) in [0, 1]; rows sum to at most 1. Only each row's three best are not zero.
    """
    best, nearest = scores.topk(min(_NEIGHBOURS, scores.shape[2]), dim=2)  # (B, n, 3): the others are never chosen
    logits = best / _TEMPERATURE_OF_SCORES
    chosen = torch.zeros_like(logits)
    least = torch.finfo(logits.dtype).tiny
    for _ in range(r):
        choice = (logits / _TEMPERATURE_OF_CHOICE).flatten(1).softmax(dim=1).view_as(logits)
        chosen = chosen + choice
        logits = logits + (1 - choice.sum(dim=2, keepdim=True)).clamp(min=least).log()
    chosen = chosen / chosen.sum(dim=2, keepdim=True).clamp(min=1).detach()
    return torch.zeros_like(scores).scatter(2, nearest, chosen)


def soft_merge(
    x: Tensor, size: Tensor | None, metric: Tensor, r: int, num_effective: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Merge r tokens in part, with gradients to what they are compared by.

    Args:
        x: (B, N, D) tokens.
        size: (B, N) weights; None if all are one.
        metric: (B, N, d) what tokens are compared by: the cosine between these.
        r: Tokens to merge.
        num_effective: Tokens in front, prefix tokens included, that hard merging would have left.
        num_prefix_tokens: Of them, those that take no part.

    Returns:
        (B, N, D) tokens and their (B, N) weights, by weight behind the prefix tokens.
    """
    dtype = at_least_float32(x.dtype)
    size = x.new_ones(x.shape[:2], dtype=dtype) if size is None else size.to(dtype)
    a = slice(num_prefix_tokens, num_effective, 2)
    b = slice(num_prefix_tokens + 1, num_effective, 2)
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(metric.to(dtype), dim=-1)
        pairs = relaxed_pairs(unit[:, a] @ unit[:, b].transpose(1, 2), r)  # (B, n, m)
        moved = pairs * size[:, a, None]
        weight_b = size[:, b] + moved.sum(dim=1)
        tokens_b = size[:, b, None] * x[:, b] + moved.transpose(1, 2) @ x[:, a].to(dtype)
        tokens_b = tokens_b / weight_b[..., None].clamp(min=torch.finfo(dtype).tiny)
    remaining = 1 - pairs.sum(dim=2)
    remaining = remaining + (remaining.clamp(0, 1) - remaining).detach()  # clipped, with the gradient of what is not
    weight = torch.cat([size[:, a] * remaining, weight_b, size[:, num_effective:]], dim=1)
    tokens = torch.cat([x[:, a], tokens_b.to(x.dtype), x[:, num_effective:]], dim=1)
    order = weight.argsort(dim=1, descending=True, stable=True)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    prefix = slice(0, num_prefix_tokens)
    return torch.cat([x[:, prefix], tokens], dim=1), torch.cat([size[:, prefix], weight.gather(1, order)], dim=1)
