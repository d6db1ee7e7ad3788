"""Which patches stay coarse: from scores to scale maps, by thresholds, by a share per image, and within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Budget", "MergeOrder", "choose_scales", "merge_costs", "scales_from_share", "scales_from_thresholds"]


@dataclass(frozen=True)
class Budget:
    """How many tokens images may cost.

    Thresholds decide, or a share, or both with ``blend``; limits hold whatever decides. Where they move an image's
    number of tokens, the patches that score lowest are merged first, as a share does it.

    Attributes:
        thresholds: From fine to coarse; a patch is kept coarse where its score is strictly below.
        keep: Share of its patch tokens that every image keeps.
        blend: With thresholds and a share: each image's number of tokens lies between what the two give it, at 0 that
            of the thresholds, at 1 that of the share.
        min_keep: Share of its patch tokens that no image falls below.
        max_tokens: Tokens that no image exceeds, prefix tokens included. Stronger than ``min_keep``.
        max_batch_tokens: Tokens that no batch exceeds, prefix tokens included. Stronger than ``min_keep``, which it
            leaves alone for as long as it can.

    Raises:
        ValueError: If a number is out of range, or two of them contradict each other.
    """

    thresholds: tuple[float, ...] | None = None
    keep: float | None = None
    blend: float | None = None
    min_keep: float = 0.0
    max_tokens: int | None = None
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.thresholds is not None and not all(isinstance(t, (int, float)) and t == t for t in self.thresholds):
            raise ValueError(
                f"thresholds must be numbers, one for each size above the base patch; got {self.thresholds!r}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} must be a share of the patch tokens in (0, 1]")
        if self.blend is None and self.thresholds is not None and self.keep is not None:
            raise ValueError(
                f"give thresholds={self.thresholds!r} or keep={self.keep!r}, not both: each decides what is merged. "
                "blend=0.5 takes the middle"
            )
        if self.blend is not None and not 0 <= self.blend <= 1:
            raise ValueError(f"blend={self.blend!r} must be in [0, 1]: 0 is what thresholds give, 1 is what keep gives")
        if self.blend is not None and (self.thresholds is None) != (self.keep is None):
            raise ValueError(f"blend={self.blend:g} needs both thresholds and keep, or calibrate(), which finds them")
        if not 0 <= self.min_keep <= 1:
            raise ValueError(f"min_keep={self.min_keep!r} must be a share of the patch tokens in [0, 1]")
        if self.keep is not None and self.min_keep > self.keep:
            raise ValueError(f"min_keep={self.min_keep:g} is above keep={self.keep:g}: no image could keep so few")
        for name in ("max_tokens", "max_batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")

    @property
    def is_limited(self) -> bool:
        """Whether anything but thresholds or a share alone decides."""
        return self.blend is not None or (self.min_keep, self.max_tokens, self.max_batch_tokens) != (0, None, None)

    @property
    def needs_scores(self) -> bool:
        """Whether there is anything to choose: negative thresholds, or a share of 1, merge nothing."""
        merges_nothing = self.keep == 1 or (self.keep is None and all(t < 0 for t in self.thresholds or ()))
        return self.is_limited or not merges_nothing

    def deciding(self, thresholds: tuple[float, ...] | None, keep: float | None) -> Budget:
        """The same limits with other thresholds, or another share."""
        return replace(self, thresholds=thresholds, keep=keep)

    def merges(self, by_thresholds: Tensor, num_patches: int, available: int, num_prefix_tokens: int) -> Tensor:
        """How often an image is merged, each time saving three tokens. Leaves ``max_batch_tokens`` to the batch.

        Args:
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
        if self.keep is not None:
            by_share = merges_of_share(self.keep, num_patches, available)
            if self.thresholds is None:
                merges = torch.full_like(by_thresholds, by_share)
            else:
                towards_share = (by_share - by_thresholds).double() * (self.blend or 0.0)
                merges = (by_thresholds + towards_share).round().long()
        least = 0
        if self.max_tokens is not None:
            least = max(0, math.ceil((num_patches + num_prefix_tokens - self.max_tokens) / 3))
            if least > available:
                fewest = num_patches + num_prefix_tokens - 3 * available
                raise ValueError(
                    f"max_tokens={self.max_tokens} cannot be reached: an image of {num_patches} base patches has at "
                    f"least {fewest} tokens with these scales. Allow more, give more scales, or smaller images"
                )
        return merges.clamp(max=self.most_merges(num_patches, available)).clamp(min=least)

    def most_merges(self, num_patches: int, available: int) -> int:
        """Merges that leave an image ``min_keep`` of its tokens."""
        return min(available, math.floor((1 - self.min_keep) * num_patches / 3 + 1e-9))


def merges_of_share(keep: float, num_patches: int, available: int) -> int:
    """Merges that leave the share nearest to ``keep``."""
    merges = round((1 - keep) * num_patches / 3)
    if merges > available:
        least = (num_patches - 3 * available) / num_patches
        raise ValueError(
            f"keep={keep:g} is below the least share that these scales can reach on a grid of {num_patches} patches "
            f"({least:.3f}): ask for more, or give more scales"
        )
    return merges


def choose_scales(
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
    groups = list(zip(scores, grid_sizes, num_images, strict=True))
    if not budget.is_limited:
        if budget.keep is not None:
            return [scales_from_share(one, budget.keep, grid, count) for one, grid, count in groups]
        return [scales_from_thresholds(one, budget.thresholds or (), grid, count) for one, grid, count in groups]
    maps, orders, wished, merges = [], [], [], []
    for one, grid, count in groups:
        scale_map = scales_from_thresholds(one, budget.thresholds or (), grid, count)
        order = MergeOrder(one, grid, count)
        num_patches = math.prod(grid)
        # A cell under a patch of scale i is 1/4^i of a token, and a merge saves three tokens.
        saved = num_patches - torch.pow(0.25, scale_map.float()).sum((1, 2))
        wished.append((saved / 3).round().long())
        merges.append(budget.merges(wished[-1], num_patches, order.available, num_prefix_tokens))
        maps.append(scale_map)
        orders.append(order)
    if budget.max_batch_tokens is not None:
        _cap_batch(merges, orders, budget, num_prefix_tokens)
    by_thresholds = budget.thresholds is not None
    for i, (order, before, after) in enumerate(zip(orders, wished, merges, strict=True)):
        limited = order.scale_map(after)
        # What thresholds chose stays as it is wherever its number of tokens is allowed.
        maps[i] = torch.where((before == after)[:, None, None], maps[i], limited) if by_thresholds else limited
    return maps


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
        protected = rank >= budget.most_merges(num_patches, order.available)
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


def scales_from_thresholds(
    scores: Mapping[int, Tensor], thresholds: Sequence[float], grid_size: tuple[int, int], num_images: int
) -> Tensor:
    """Keep a patch coarse where its score lies strictly below its scale's threshold; coarser wins over finer.

    Each scale is decided by itself, as in the paper's section 3.1 (Eq. 1): a 4x patch may be kept although its 2x
    patches would not pass.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores of the patches that lie wholly inside the image.
        thresholds: ``thresholds[i-1]`` belongs to factor 2^i.
        grid_size: (h, w) base patches.
        num_images: B.

    Returns:
        (B, h, w) int8 scale map.
    """
    scale_map = _base_scales(scores, grid_size, num_images)
    for i, threshold in enumerate(thresholds, start=1):
        _fill(scale_map, scores[2**i] < threshold, i)
    return scale_map


def scales_from_share(scores: Mapping[int, Tensor], keep: float, grid_size: tuple[int, int], num_images: int) -> Tensor:
    """Give every image the same share of its patch tokens, merging what scores lowest, in the order of `MergeOrder`.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores.
        keep: Patch tokens kept / patch tokens of the uniform grid.
        grid_size: (h, w) base patches.
        num_images: B.

    Returns:
        (B, h, w) int8 scale map.

    Raises:
        ValueError: If merging every patch of every scale still keeps more than ``keep``.
    """
    available = sum(math.prod(side // factor for side in grid_size) for factor in scores)
    merges = merges_of_share(keep, math.prod(grid_size), available)
    if merges == 0:
        return _base_scales(scores, grid_size, num_images)
    return MergeOrder(scores, grid_size, num_images).scale_map(merges)


class MergeOrder:
    """The merges of images of one size, cheapest first.

    Merges are nested: four patches become one, and a 4x patch is made of four 2x patches. So each merge saves exactly
    three tokens. A patch counts as at least as complex as the patches inside it, which makes the cheapest merges a
    valid set at any number.

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
        # Finer scales first, and stable: no patch comes before its parts, which cost no more.
        self.costs, self._order = flat.sort(dim=1, stable=True)  # (B, merges)

    @property
    def available(self) -> int:
        """Merges that an image has."""
        return self.costs.shape[1]

    def scale_map(self, num_merges: Tensor | int) -> Tensor:
        """(B, h, w) int8: after the first merges of each image, a (B,) number or the same for all."""
        limit = num_merges[:, None] if isinstance(num_merges, Tensor) else num_merges
        first = (torch.arange(self.available, device=self.costs.device) < limit).expand_as(self._order)
        chosen = torch.zeros_like(first).scatter_(1, self._order, first)
        scale_map = torch.zeros(len(chosen), *self.grid_size, dtype=torch.int8, device=chosen.device)
        pieces = chosen.split([math.prod(shape[1:]) for shape in self._shapes], dim=1)
        for i, (shape, piece) in enumerate(zip(self._shapes, pieces, strict=True), start=1):
            _fill(scale_map, piece.reshape(shape), i)
        return scale_map


def merge_costs(scores: Mapping[int, Tensor], num_images: int) -> Tensor:
    """Below which threshold, the same for all scales, each merge happens; in no order.

    A 2x patch is merged where its own score or that of a coarser patch around it lies below: coarser wins.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores.
        num_images: B.

    Returns:
        (B, merges): each image loses three tokens for each entry below the threshold.
    """
    costs: list[Tensor] = []
    for factor in sorted(scores, reverse=True):
        cost = scores[factor].float()
        if costs:
            cost = cost.clone()
            around = costs[-1].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            covered = cost[:, : around.shape[1], : around.shape[2]]
            covered.copy_(torch.minimum(covered, around))
        costs.append(cost)
    return torch.cat([cost.flatten(1) for cost in costs], dim=1) if costs else torch.zeros(num_images, 0)


def _base_scales(scores: Mapping[int, Tensor], grid_size: tuple[int, int], num_images: int) -> Tensor:
    device = next(iter(scores.values())).device if scores else None
    return torch.zeros(num_images, *grid_size, dtype=torch.int8, device=device)


def _fill(scale_map: Tensor, chosen: Tensor, scale: int) -> None:
    """Write a scale into the cells of the chosen patches. chosen: (B, h // 2^scale, w // 2^scale) bool."""
    side, (rows, cols) = 2**scale, chosen.shape[1:]
    # (B, h, w) -> (B, rows, side, cols, side): a view
    cells = scale_map[:, : rows * side, : cols * side].unflatten(2, (cols, side)).unflatten(1, (rows, side))
    cells.masked_fill_(chosen[:, :, None, :, None], scale)
