"""Why is a pixel in the patch that it is in? The candidates over it, their scores, and the rule that chose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from aptvit.patching.limits import choose_within_limits
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.selection import MergeOrder, is_limited, scales_from_thresholds

__all__ = ["CandidatePatch", "Explanation", "explain"]


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


@torch.no_grad()
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
    ((group, scores),) = patchifier.scores([image])
    rows, cols = grid = group.grid_size(patchifier.patch_size)
    height, width = (min(n * patchifier.patch_size, side) for n, side in zip(grid, image.shape[1:], strict=True))
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"pixel ({x}, {y}) is outside the image of {width} x {height} pixels: x, y count from 0")
    budget, order = patchifier.budget, MergeOrder(scores, grid, 1)
    by_thresholds = scales_from_thresholds(scores, budget.thresholds or (), grid, 1)
    if budget.keep is None and not is_limited(budget):
        chosen, rule = by_thresholds, "thresholds"
    else:
        (chosen,) = choose_within_limits([scores], [grid], [1], budget, patchifier.num_prefix_tokens)
        rule = "thresholds" if budget.thresholds is not None and chosen.equal(by_thresholds) else "share"
    merges = round(float(rows * cols - torch.pow(0.25, chosen.float()).sum()) / 3)
    cut = float(order.costs[0, merges]) if merges < order.available else math.inf
    cell = y // patchifier.patch_size, x // patchifier.patch_size
    scale = int(chosen[0, cell[0], cell[1]])
    candidates = []
    for i in range(len(scores), -1, -1):
        row, col = cell[0] >> i, cell[1] >> i
        of_scale = scores[2**i][0] if i else None
        inside = of_scale is not None and row < of_scale.shape[0] and col < of_scale.shape[1]
        score = float(of_scale[row, col]) if of_scale is not None and inside else None
        cost, limit, allowed = None, None, i == 0
        if score is not None and rule == "thresholds":
            cost, limit = score, (budget.thresholds or ())[i - 1]
            allowed = score < limit
        elif score is not None:  # merges are nested: what is merged is part of the patch that is there
            cost, limit, allowed = _largest_inside(scores, i, row, col), cut, scale >= i
        size = patchifier.patch_size << i
        neighbours = _neighbours(of_scale, row, col)
        candidates.append(
            CandidatePatch(i, col * size, row * size, size, score, cost, limit, allowed, i == scale, neighbours)
        )
    return Explanation(x, y, rule, merges, tuple(candidates))


def _largest_inside(scores: Mapping[int, Tensor], scale: int, row: int, col: int) -> float:
    """The largest score of a candidate and of those inside it, as `MergeOrder` compares them."""
    parts = []
    for finer in range(1, scale + 1):
        step = scale - finer
        inside = scores[2**finer][0, row << step : (row + 1) << step, col << step : (col + 1) << step]
        parts.append(float(inside.max()))
    return max(parts)


def _neighbours(scores: Tensor | None, row: int, col: int) -> tuple[tuple[float | None, ...], ...]:
    """3 x 3 scores around a place, None outside; nothing where there are no scores."""
    if scores is None:
        return ()
    rows, cols = scores.shape

    def at(i: int, j: int) -> float | None:
        return float(scores[i, j]) if 0 <= i < rows and 0 <= j < cols else None

    return tuple(tuple(at(i, j) for j in (col - 1, col, col + 1)) for i in (row - 1, row, row + 1))
