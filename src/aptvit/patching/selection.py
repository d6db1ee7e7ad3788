"""From scores to scale maps, by thresholds or by a share of the tokens per image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aptvit.patching.budget import Budget

__all__ = ["MergeOrder", "choose_scales", "is_limited", "merges_of_share", "needs_scores", "scales_from_thresholds"]


def is_limited(budget: Budget) -> bool:
    """Whether a budget has a blend or limits."""
    return budget.blend is not None or (budget.min_keep, budget.max_tokens, budget.max_batch_tokens) != (0, None, None)


def needs_scores(budget: Budget) -> bool:
    """Whether a budget needs scores: negative thresholds, or a share of 1, merge nothing."""
    merges_nothing = budget.keep == 1 or (budget.keep is None and all(t < 0 for t in budget.thresholds or ()))
    return is_limited(budget) or not merges_nothing


def merges_of_share(keep: float, num_patches: int, available: int) -> int:
    """Number of merges that leave the share nearest to ``keep``.

    Raises:
        ValueError: If merging every patch of every scale still keeps more than the share.
    """
    merges = round((1 - keep) * num_patches / 3)
    if merges > available:
        least = (num_patches - 3 * available) / num_patches
        raise ValueError(
            f"keep={keep:g} is below the least share that these scales can reach on a grid of {num_patches} patches "
            f"({least:.3f}): ask for more, or give more scales"
        )
    return merges


def choose_scales(scores: Mapping[int, Tensor], budget: Budget, grid_size: tuple[int, int], num_images: int) -> Tensor:
    """Choose the patches of images of one size by thresholds, or by a share that every image keeps.

    A share merges the patches with the lowest scores, in the order of `MergeOrder`. Budgets with limits are handled by
    `aptvit.patching.limits`.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores.
        budget: A budget without limits.
        grid_size: (h, w) base patches.
        num_images: B.

    Returns:
        (B, h, w) int8 scale map.

    Raises:
        ValueError: If merging every patch of every scale still keeps more than the share.
    """
    if budget.keep is None:
        return scales_from_thresholds(scores, budget.thresholds or (), grid_size, num_images)
    available = sum(math.prod(side // factor for side in grid_size) for factor in scores)
    merges = merges_of_share(budget.keep, math.prod(grid_size), available)
    return MergeOrder(scores, grid_size, num_images).scale_map(merges)


def scales_from_thresholds(
    scores: Mapping[int, Tensor], thresholds: Sequence[float], grid_size: tuple[int, int], num_images: int
) -> Tensor:
    """Keep a patch coarse where its score is strictly below its scale's threshold; coarser wins over finer.

    Each scale is decided independently, as in the paper's section 3.1 (Eq. 1): a 4x patch may stay coarse although the
    scores of its 2x patches are above their threshold.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores of the patches that lie wholly inside the image.
        thresholds: ``thresholds[i-1]`` belongs to factor 2^i.
        grid_size: (h, w) base patches.
        num_images: B.

    Returns:
        (B, h, w) int8 scale map.
    """
    device = next(iter(scores.values())).device if scores else None
    scale_map = torch.zeros(num_images, *grid_size, dtype=torch.int8, device=device)
    for i, threshold in enumerate(thresholds, start=1):
        _fill(scale_map, scores[2**i] < threshold, i)
    return scale_map


class MergeOrder:
    """The merges of images of one size, cheapest first.

    Merges are nested: four patches become one, and a 4x patch is made of four 2x patches. So each merge saves exactly
    three tokens. The cost of a merge is the patch's score, but at least the cost of each merge inside the patch. So the
    first n merges are a valid set for every n.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores.
        grid_size: (h, w) base patches.
        num_images: B.
    """

    def __init__(self, scores: Mapping[int, Tensor], grid_size: tuple[int, int], num_images: int) -> None:
        self.grid_size = grid_size
        costs: list[Tensor] = []
        for factor in sorted(scores):
            cost = scores[factor].float()
            if costs:
                _, rows, cols = cost.shape
                finer = costs[-1][:, : 2 * rows, : 2 * cols].unflatten(2, (cols, 2)).unflatten(1, (rows, 2))
                cost = torch.maximum(cost, finer.amax((2, 4)))
            costs.append(cost)
        self._shapes = [cost.shape for cost in costs]
        flat = torch.cat([cost.flatten(1) for cost in costs], dim=1) if costs else torch.zeros(num_images, 0)
        # Finer scales first, and a stable sort: no patch comes before its parts, which cost at most as much.
        self.costs, self._order = flat.sort(dim=1, stable=True)  # (B, merges)

    @property
    def available(self) -> int:
        """Merges that an image has."""
        return self.costs.shape[1]

    def scale_map(self, num_merges: Tensor | int) -> Tensor:
        """Scale map after the first merges of each image.

        Args:
            num_merges: (B,) number of merges, or one number for all images.

        Returns:
            (B, h, w) int8.
        """
        limit = num_merges[:, None] if isinstance(num_merges, Tensor) else num_merges
        first = (torch.arange(self.available, device=self.costs.device) < limit).expand_as(self._order)
        chosen = torch.zeros_like(first).scatter_(1, self._order, first)
        scale_map = torch.zeros(len(chosen), *self.grid_size, dtype=torch.int8, device=chosen.device)
        pieces = chosen.split([math.prod(shape[1:]) for shape in self._shapes], dim=1)
        for i, (shape, piece) in enumerate(zip(self._shapes, pieces, strict=True), start=1):
            _fill(scale_map, piece.reshape(shape), i)
        return scale_map


def _fill(scale_map: Tensor, chosen: Tensor, scale: int) -> None:
    """Write a scale into the cells of the chosen patches. chosen: (B, h // 2^scale, w // 2^scale) bool."""
    side, (rows, cols) = 2**scale, chosen.shape[1:]
    # (B, h, w) -> (B, rows, side, cols, side): a view
    cells = scale_map[:, : rows * side, : cols * side].unflatten(2, (cols, side)).unflatten(1, (rows, side))
    cells.masked_fill_(chosen[:, :, None, :, None], scale)
