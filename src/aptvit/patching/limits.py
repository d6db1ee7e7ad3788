"""Limits of a budget: blends of thresholds and a share, floors and ceilings of an image's and a batch's tokens."""

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
    """Choose the patches of a batch, group by group of images of one size, within a budget. Waits for no device.

    Args:
        scores: For each group, the scores of its candidate patches.
        grid_sizes: For each group, (h, w) base patches.
        num_images: For each group, its images.
        budget: How many tokens they may cost.
        num_prefix_tokens: Tokens of an image that are no patches.

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
        else:  # what thresholds chose stays as it is wherever its number of tokens is allowed
            maps[i] = torch.where((before == after)[:, None, None], maps[i], limited)
    return maps


def merges_within_limits(
    budget: Budget, by_thresholds: Tensor, num_patches: int, available: int, num_prefix_tokens: int
) -> Tensor:
    """How often an image is merged, each time saving three tokens. Leaves ``max_batch_tokens`` to the batch.

    Args:
        budget: Thresholds, share and limits.
        by_thresholds: (n,) whole number of merges that thresholds alone give.
        num_patches: Patch tokens of the uniform grid.
        available: Merges that there are.
        num_prefix_tokens: Tokens of an image that are no patches.

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
    """Merge more, the cheapest first wherever they are, until the batch has at most ``max_batch_tokens``."""
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
    costs, urgency, image = [], [], []
    first = 0
    for order, chosen, (count, num_patches) in zip(orders, merges, sizes, strict=True):
        rank = torch.arange(order.available, device=chosen.device).expand(count, -1)
        # 0: merged anyway. 1: allowed. 2: takes an image below its floor.
        protected = rank >= _most_merges(budget, num_patches, order.available)
        urgency.append(torch.where(rank < chosen[:, None], 0, 1 + protected.int()).flatten())
        costs.append(order.costs.flatten())
        image.append((torch.arange(count, device=chosen.device)[:, None] + first).expand(-1, order.available).flatten())
        first += count
    # Stable sorts keep each image's merges in their order, so that what comes first is always a valid set.
    by_cost = torch.cat(costs).argsort(stable=True)
    ranking = by_cost[torch.cat(urgency)[by_cost].argsort(stable=True)]
    counts = torch.zeros(first, dtype=torch.long, device=ranking.device)
    taken = torch.cat(image)[ranking[:needed]]
    counts.scatter_add_(0, taken, torch.ones_like(taken))
    for i, part in enumerate(counts.split([count for count, _ in sizes])):
        merges[i] = torch.maximum(merges[i], part)
