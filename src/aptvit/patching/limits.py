"""Limits of a budget: blends of thresholds and a share, least and most tokens of an image, most tokens of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aptvit.patching.budget import Budget
from aptvit.patching.selection import MergeOrder, merges_of_share, scales_from_thresholds

__all__ = ["choose_within_limits", "merges_within_limits"]


def choose_within_limits(
    scores: Sequence[Mapping[int, Tensor]],
    grid_sizes: Sequence[tuple[int, int]],
    num_images: Sequence[int],
    budget: Budget,
    num_prefix_tokens: int = 0,
) -> list[Tensor]:
    """Choose the patches of a batch within a budget. Does not synchronise with the device.

    Args:
        scores: For each group of images of one size, for factor 2^i, (b, h // 2^i, w // 2^i) scores.
        grid_sizes: For each group, (h, w) base patches.
        num_images: For each group, the number b of its images.
        budget: How many tokens the images may cost.
        num_prefix_tokens: Prefix tokens of each image.

    Returns:
        For each group, its (b, h, w) int8 scale map.

    Raises:
        ValueError: If the budget cannot be met by these images.
    """
    maps, orders, by_thresholds, merges = [], [], [], []
    for group_scores, grid, count in zip(scores, grid_sizes, num_images, strict=True):
        scale_map = scales_from_thresholds(group_scores, budget.thresholds or (), grid, count)
        order = MergeOrder(group_scores, grid, count)
        num_patches = math.prod(grid)
        # A cell under a patch of scale i is 1/4^i of a token, and a merge saves three tokens.
        saved = num_patches - torch.pow(0.25, scale_map.float()).sum((1, 2))
        by_thresholds.append((saved / 3).round().long())
        merges.append(merges_within_limits(budget, by_thresholds[-1], num_patches, order.available, num_prefix_tokens))
        maps.append(scale_map)
        orders.append(order)
    if budget.max_batch_tokens is not None:
        _cap_batch(merges, orders, budget, num_prefix_tokens)
    for i, (order, before, after) in enumerate(zip(orders, by_thresholds, merges, strict=True)):
        limited = order.scale_map(after)
        if budget.thresholds is None:
            maps[i] = limited
        else:  # the thresholds' choice stays where its number of tokens is within the limits
            maps[i] = torch.where((before == after)[:, None, None], maps[i], limited)
    return maps


def merges_within_limits(
    budget: Budget, by_thresholds: Tensor, num_patches: int, available: int, num_prefix_tokens: int
) -> Tensor:
    """Number of merges of an image, each saving three tokens. Does not apply ``max_batch_tokens``.

    Args:
        budget: Thresholds, share and limits.
        by_thresholds: (n,) integer numbers of merges by thresholds alone.
        num_patches: Patch tokens of the uniform grid.
        available: Most merges of an image.
        num_prefix_tokens: Prefix tokens of an image.

    Returns:
        (n,) int64.

    Raises:
        ValueError: If the share or ``max_tokens`` cannot be reached.
    """
    merges = by_thresholds
    if budget.keep is not None:
        by_share = merges_of_share(budget.keep, num_patches, available)
        if budget.thresholds is None:
            merges = torch.full_like(by_thresholds, by_share)
        else:
            towards_share = (by_share - by_thresholds).double() * (budget.blend or 0.0)
            merges = (by_thresholds + towards_share).round().long()
    least = 0
    if budget.max_tokens is not None:
        least = max(0, math.ceil((num_patches + num_prefix_tokens - budget.max_tokens) / 3))
        if least > available:
            fewest = num_patches + num_prefix_tokens - 3 * available
            raise ValueError(
                f"max_tokens={budget.max_tokens} cannot be reached: an image of {num_patches} base patches has at "
                f"least {fewest} tokens with these scales. Allow more, give more scales, or smaller images"
            )
    return merges.clamp(max=_most_merges(budget, num_patches, available)).clamp(min=least)


def _most_merges(budget: Budget, num_patches: int, available: int) -> int:
    """Merges that leave an image ``min_keep`` of its tokens."""
    return min(available, math.floor((1 - budget.min_keep) * num_patches / 3 + 1e-9))


def _cap_batch(merges: list[Tensor], orders: Sequence[MergeOrder], budget: Budget, num_prefix_tokens: int) -> None:
    """Add the cheapest merges of all images, in place, until the batch has at most ``max_batch_tokens``."""
    assert budget.max_batch_tokens is not None
    sizes = [(len(order.costs), math.prod(order.grid_size)) for order in orders]
    tokens = sum(count * (num_patches + num_prefix_tokens) for count, num_patches in sizes)
    needed = math.ceil((tokens - budget.max_batch_tokens) / 3)
    available = sum(order.costs.numel() for order in orders)
    if needed > available:
        images = sum(count for count, _ in sizes)
        raise ValueError(
            f"max_batch_tokens={budget.max_batch_tokens} cannot be reached: these {images} images have at least "
            f"{tokens - 3 * available} tokens with these scales. Allow more, give more scales, or smaller batches"
        )
    if needed <= 0:
        return
    costs, priority, image = [], [], []
    first = 0
    for order, num_merges, (count, num_patches) in zip(orders, merges, sizes, strict=True):
        rank = torch.arange(order.available, device=num_merges.device).expand(count, -1)
        # 0: merged already. 1: allowed. 2: takes an image below min_keep.
        protected = rank >= _most_merges(budget, num_patches, order.available)
        priority.append(torch.where(rank < num_merges[:, None], 0, 1 + protected.int()).flatten())
        costs.append(order.costs.flatten())
        image.append(
            (torch.arange(count, device=num_merges.device)[:, None] + first).expand(-1, order.available).flatten()
        )
        first += count
    # Stable sorts keep each image's merges in order, so that any first merges of the ranking are a valid set.
    by_cost = torch.cat(costs).argsort(stable=True)
    ranking = by_cost[torch.cat(priority)[by_cost].argsort(stable=True)]
    counts = torch.zeros(first, dtype=torch.long, device=ranking.device)
    merged = torch.cat(image)[ranking[:needed]]
    counts.scatter_add_(0, merged, torch.ones_like(merged))
    for i, part in enumerate(counts.split([count for count, _ in sizes])):
        merges[i] = torch.maximum(merges[i], part)
