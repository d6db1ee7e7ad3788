"""Differentiable merging: DTEM's relaxation of ToMe, which removes no tokens (Lee & Hong, NeurIPS 2024).

Each token has a weight. Merging moves a part of the weight of tokens of A to similar tokens of B, by a relaxed choice
of the r best pairs. Tokens are sorted by weight; those beyond the number that hard merging would leave have almost no
weight and are left out of later matchings.
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
    """A relaxed choice of r pairs from different rows: r times a softmax over all pairs, each time without the pairs
    chosen before.

    Args:
        scores: (B, n, m) similarity of each token of A to each of B.
        r: Pairs to choose.

    Returns:
        (B, n, m) in [0, 1]; rows sum to at most 1. Only the three best pairs of a row are not zero.
    """
    best, nearest = scores.topk(min(_NEIGHBOURS, scores.shape[2]), dim=2)  # (B, n, 3): other pairs are not chosen
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
    """Merge r tokens in part, with gradients for the metric.

    Args:
        x: (B, N, D) tokens.
        size: (B, N) weights; None if all are 1.
        metric: (B, N, d) features, compared by their cosine.
        r: Number of tokens to merge.
        num_effective: Number of first tokens, prefix tokens included, that hard merging would have left before.
        num_prefix_tokens: Prefix tokens in front, which are not merged.

    Returns:
        (B, N, D) tokens and their (B, N) weights: prefix tokens, then the others by decreasing weight.
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
    remaining = remaining + (remaining.clamp(0, 1) - remaining).detach()  # clipped, with the gradient of the identity
    weight = torch.cat([size[:, a] * remaining, weight_b, size[:, num_effective:]], dim=1)
    tokens = torch.cat([x[:, a], tokens_b.to(x.dtype), x[:, num_effective:]], dim=1)
    order = weight.argsort(dim=1, descending=True, stable=True)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))
    prefix = slice(0, num_prefix_tokens)
    return torch.cat([x[:, prefix], tokens], dim=1), torch.cat([size[:, prefix], weight.gather(1, order)], dim=1)
