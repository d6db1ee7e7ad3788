"""Why is a pixel in the patch that it is in? The candidates over it, their scores, and the rule that chose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.patching.limits import choose_within_limits
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.selection import MergeOrder, is_limited, scales_from_thresholds

__all__ = ["CandidatePatch", "Explanation", "MergeDecisions", "explain", "merge_decisions"]


@dataclass(frozen=True)
class CandidatePatch:
    """A patch that could cover the pixel.

    Attributes:
        scale: It covers 2^scale x 2^scale base patches.
        left: Of its left column of pixels.
        top: Of its top row of pixels.
        size: Its side in pixels.
        score: Its score; None where it does not lie wholly inside the image, and of the base patch.
        cost: What is compared with the limit: its score, or with a share the largest score of the candidates in it.
        limit: It may stay coarse below this: its threshold, or the cut that the share of the tokens amounts to in this
            image. None where there is no score.
        allowed: Whether its own score lets it stay coarse; always, for the base patch.
        chosen: Whether it is the patch that covers the pixel: the coarsest that is allowed.
        neighbours: Scores of the 3 x 3 candidates of its size, itself in the middle; None outside the image.
    """

    scale: int
    left: int
    top: int
    size: int
    score: float | None
    cost: float | None
    limit: float | None
    allowed: bool
    chosen: bool
    neighbours: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Explanation:
    """Why a pixel is in the patch that it is in.

    Attributes:
        x: Column of the pixel in the image as it is cut.
        y: Its row.
        rule: ``"thresholds"``: each scale by itself, a candidate stays coarse where its score is strictly below its
            threshold, and coarser wins. ``"share"``: the cheapest merges of the image, until the share is reached.
        merges: Merges of the image, each of which saves three tokens.
        candidates: From the coarsest to the base patch.
    """

    x: int
    y: int
    rule: str
    merges: int
    candidates: tuple[CandidatePatch, ...]

    @property
    def patch(self) -> CandidatePatch:
        """The patch that covers the pixel."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a limit above all scores is None there."""
        values = asdict(self)
        for candidate in values["candidates"]:
            if candidate["limit"] is not None and math.isinf(candidate["limit"]):
                candidate["limit"] = None
        return values


@dataclass(frozen=True, eq=False)
class MergeDecisions:
    """What was compared with what in one image, for every candidate.

    Attributes:
        image_size: Height and width of what is cut, in pixels.
        patch_size: Side of a base patch in pixels.
        scales: (h, w) scale of the patch that covers each base cell.
        scores: For each scale from 1, (h_i, w_i) scores of the candidates that lie wholly inside the image.
        costs: For each scale from 1, (h_i, w_i) what is compared with the limit, as in `CandidatePatch`.
        limits: For each scale from 1, as in `CandidatePatch`.
        rule: As in `Explanation`.
        merges: As in `Explanation`.
    """

    image_size: tuple[int, int]
    patch_size: int
    scales: Tensor
    scores: tuple[Tensor, ...]
    costs: tuple[Tensor, ...]
    limits: tuple[float, ...]
    rule: str
    merges: int

    def at(self, x: int, y: int) -> Explanation:
        """Why a pixel is in the patch that it is in.

        Args:
            x: Column of the pixel, from 0.
            y: Row of the pixel, from 0.

        Raises:
            ValueError: If the pixel is not in the image.
        """
        height, width = self.image_size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"pixel ({x}, {y}) is outside the image of {width} x {height} pixels: x, y count from 0")
        row, col = y // self.patch_size, x // self.patch_size
        candidates = [self.candidate(scale, row >> scale, col >> scale) for scale in range(len(self.scores), -1, -1)]
        return Explanation(x, y, self.rule, self.merges, tuple(candidates))

    def candidate(self, scale: int, row: int, col: int) -> CandidatePatch:
        """What was decided about a candidate.

        Args:
            scale: Its scale.
            row: Its row, in patches of this scale.
            col: Its column, in patches of this scale.
        """
        chosen = int(self.scales[row << scale, col << scale])  # of all its cells, if it is not divided
        size, scores = self.patch_size << scale, self.scores[scale - 1] if scale else None
        neighbours = () if scores is None else _neighbours(scores, row, col)
        score = neighbours[1][1] if neighbours else None
        cost = limit = None
        allowed = scale == 0
        if score is not None:
            cost, limit = float(self.costs[scale - 1][row, col]), self.limits[scale - 1]
            # Merges are nested: what is merged is part of the patch that is there.
            allowed = cost < limit if self.rule == "thresholds" else chosen >= scale
        return CandidatePatch(
            scale, col * size, row * size, size, score, cost, limit, allowed, scale == chosen, neighbours
        )


@torch.no_grad()
def merge_decisions(patchifier: Patchifier, image: Tensor) -> MergeDecisions:
    """What was compared with what when an image is cut by itself.

    Args:
        patchifier: What cuts the image.
        image: (C, H, W).

    Returns:
        The decisions, on the CPU.

    Raises:
        ValueError: If the image does not fit.
    """
    ((group, of_factor),) = patchifier.scores([image])
    rows, cols = grid = group.grid_size(patchifier.patch_size)
    height, width = (min(n * patchifier.patch_size, side) for n, side in zip(grid, image.shape[1:], strict=True))
    budget, order = patchifier.budget, MergeOrder(of_factor, grid, 1)
    scores = tuple(of_factor[2**scale][0].cpu() for scale in range(1, len(of_factor) + 1))
    by_thresholds = scales_from_thresholds(of_factor, budget.thresholds or (), grid, 1)
    if budget.keep is None and not is_limited(budget):
        chosen, rule = by_thresholds, "thresholds"
    else:
        (chosen,) = choose_within_limits([of_factor], [grid], [1], budget, patchifier.num_prefix_tokens)
        rule = "thresholds" if budget.thresholds is not None and chosen.equal(by_thresholds) else "share"
    merges = round(float(rows * cols - torch.pow(0.25, chosen.float()).sum()) / 3)
    costs, limits = scores, tuple(budget.thresholds or ())
    if rule == "share":
        cut = float(order.costs[0, merges]) if merges < order.available else math.inf
        costs, limits = _largest_inside(scores), (cut,) * len(scores)
    return MergeDecisions((height, width), patchifier.patch_size, chosen[0].cpu(), scores, costs, limits, rule, merges)


def explain(patchifier: Patchifier, image: Tensor, x: int, y: int) -> Explanation:
    """Which patch covers a pixel, and why.

    Args:
        patchifier: What cuts the image.
        image: (C, H, W).
        x: Column of the pixel, from 0.
        y: Row of the pixel, from 0.

    Raises:
        ValueError: If the pixel is not in the image, or the image does not fit.
    """
    return merge_decisions(patchifier, image).at(x, y)


def _largest_inside(scores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The largest score of each candidate and of those inside it, as `MergeOrder` compares them."""
    costs: list[Tensor] = []
    for of_scale in scores:
        costs.append(torch.maximum(of_scale, F.max_pool2d(costs[-1][None], 2)[0]) if costs else of_scale)
    return tuple(costs)


def _neighbours(scores: Tensor, row: int, col: int) -> tuple[tuple[float | None, ...], ...]:
    """3 x 3 scores around a place, None outside."""
    rows, cols = scores.shape

    def at(i: int, j: int) -> float | None:
        return float(scores[i, j]) if 0 <= i < rows and 0 <= j < cols else None

    return tuple(tuple(at(i, j) for j in (col - 1, col, col + 1)) for i in (row - 1, row, row + 1))
