"""ToMe's bipartite matching by any metric (Bolya et al., 2023, section 3).

    positions      0   1   2   3   4   5   6        even positions are A, odd positions B
    class token    *
    A                      2       4       6        each is paired with its most similar token of B,
    B                  1       3       5            and the r best pairs are merged

Prefix tokens are not merged, but count for even and odd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.merging.blocks import at_least_float32

__all__ = ["Matching", "bipartite_matching", "merge", "most_mergeable"]


@dataclass(frozen=True, eq=False)
class Matching:
    """Pairs of tokens to merge, as positions inside A and B without prefix tokens.

    Attributes:
        source: (B, r) tokens of A that are merged into tokens of B.
        target: (B, r) tokens of B that they are merged into; several may have the same target.
        stay: (B, |A| - r) the other tokens of A.
        num_prefix_tokens: Prefix tokens in front of A and B.
    """

    source: Tensor
    target: Tensor
    stay: Tensor
    num_prefix_tokens: int


def most_mergeable(num_tokens: int, num_prefix_tokens: int) -> int:
    """Most tokens that one matching can merge: half of the tokens without prefix tokens."""
    return (num_tokens - num_prefix_tokens) // 2


@torch.no_grad()
def bipartite_matching(metric: Tensor, r: int, num_prefix_tokens: int) -> Matching:
    """Find the r pairs with the greatest cosine similarity, in at least float32. Of equal pairs, the first.

    Args:
        metric: (B, N, d) features of the tokens.
        r: Number of tokens to merge.
        num_prefix_tokens: Prefix tokens in front, which are not merged.

    Raises:
        ValueError: If r is negative or more than half of the tokens.
    """
    most = most_mergeable(metric.shape[1], num_prefix_tokens)
    if not 0 <= r <= most:
        raise ValueError(f"r={r} of {metric.shape[1]} tokens cannot be merged: give 0 to {most}")
    # Autocast would multiply in half precision.
    with torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(metric.to(at_least_float32(metric.dtype)), dim=-1)
        a, b = _halves(unit, num_prefix_tokens)
        score, nearest = (a @ b.transpose(1, 2)).max(dim=-1)  # (B, |A|)
    source, stay = score.argsort(dim=-1, descending=True, stable=True).tensor_split([r], dim=1)
    if num_prefix_tokens:  # as in ToMe: without prefix tokens they stay in the order of similarity
        stay = stay.sort(dim=-1).values
    return Matching(source, nearest.gather(1, source), stay, num_prefix_tokens)


def merge(x: Tensor, size: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Replace each group of matched tokens by its mean, weighted by size.

    Args:
        x: (B, N, D) tokens.
        size: (B, N) number of patches in each token; None if all are 1.
        matching: From `bipartite_matching`.

    Returns:
        (B, N - r, D) tokens (prefix tokens, remaining tokens of A, B) and their (B, N - r) sizes.
    """
    num_prefix, dtype = matching.num_prefix_tokens, at_least_float32(x.dtype)
    size = x.new_ones(x.shape[:2], dtype=dtype) if size is None else size.to(dtype)
    (a, b), (size_a, size_b) = _halves(x, num_prefix), _halves(size, num_prefix)
    moved_size = size_a.gather(1, matching.source)
    new_size = size_b.scatter_add(1, matching.target, moved_size)
    weighted = _rows(a, matching.source) * moved_size[..., None]  # (B, r, D)
    target = matching.target[..., None].expand_as(weighted)
    merged = (b * size_b[..., None]).scatter_add_(1, target, weighted) / new_size[..., None]
    x = torch.cat([x[:, :num_prefix], _rows(a, matching.stay), merged.to(x.dtype)], dim=1)
    return x, torch.cat([size[:, :num_prefix], size_a.gather(1, matching.stay), new_size], dim=1)


def _halves(x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """A and B of (B, N, ...): even and odd positions, without prefix tokens."""
    first_even = num_prefix_tokens + num_prefix_tokens % 2
    first_odd = num_prefix_tokens + 1 - num_prefix_tokens % 2
    return x[:, first_even::2], x[:, first_odd::2]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) at (B, n) positions -> (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
