from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scores, scored_grids, threshold_lists

from aptvit.calibration.costs import merge_costs
from aptvit.patching.budget import Budget
from aptvit.patching.layout import PatchLayout
from aptvit.patching.limits import choose_within_limits
from aptvit.patching.selection import MergeOrder, choose_scales, scales_from_thresholds


def decide_by_hand(grid: tuple[int, int], scores: Scores, thresholds: list[float], image: int) -> np.ndarray:
    """Largest patches first, each cell once."""
    scale_map = np.full(grid, -1)
    for i in range(len(thresholds), 0, -1):
        side = 2**i
        for y in range(grid[0] // side):
            for x in range(grid[1] // side):
                cells = scale_map[y * side : (y + 1) * side, x * side : (x + 1) * side]
                if float(scores[side][image, y, x]) < thresholds[i - 1] and (cells == -1).all():
                    cells[:] = i
    scale_map[scale_map == -1] = 0
    return scale_map


@settings(max_examples=80, deadline=None)
@given(scored_grids(), threshold_lists())
def test_a_patch_is_coarse_where_its_score_is_below_and_nothing_coarser_covers_it(
    case: tuple[tuple[int, int], int, int, Scores], thresholds: list[float]
) -> None:
    grid, num_scales, batch, scores = case
    scale_map = scales_from_thresholds(scores, thresholds[: num_scales - 1], grid, batch)
    assert scale_map.shape == (batch, *grid)
    for image in range(batch):
        expected = decide_by_hand(grid, scores, thresholds[: num_scales - 1], image)
        np.testing.assert_array_equal(scale_map[image].numpy(), expected)


def test_a_score_equal_to_the_threshold_stays_fine() -> None:
    scores = {2: torch.tensor([[[3.0, 2.9999]]])}
    assert scales_from_thresholds(scores, [3.0], (2, 4), 1).tolist() == [[[0, 0, 1, 1]] * 2]


def test_a_patch_may_be_kept_although_its_parts_would_not_pass() -> None:
    scores = {2: torch.full((1, 2, 2), 9.0), 4: torch.zeros(1, 1, 1)}
    assert (scales_from_thresholds(scores, [1.0, 1.0], (4, 4), 1) == 2).all()


def merges_wished(grid: tuple[int, int], keep: float) -> int:
    """The number of four-to-one merges whose token count is nearest to the wish; of two, the lower."""
    cells = grid[0] * grid[1]
    return min(range(cells + 1), key=lambda n: round(abs(cells - 3 * n - keep * cells), 6))


def share_by_hand(grid: tuple[int, int], scores: Scores, merges: int, image: int) -> np.ndarray:
    """One merge at a time: the cheapest patch whose parts are merged already."""
    scale_map = np.zeros(grid, dtype=int)
    effective: dict[tuple[int, int, int], float] = {}
    for i in range(1, len(scores) + 1):
        for y in range(grid[0] >> i):
            for x in range(grid[1] >> i):
                parts = [effective[i - 1, 2 * y + dy, 2 * x + dx] for dy in (0, 1) for dx in (0, 1) if i > 1]
                effective[i, y, x] = max([float(scores[2**i][image, y, x]), *parts])
    for _ in range(merges):
        best = None
        for (i, y, x), cost in effective.items():
            cells = scale_map[y << i : (y + 1) << i, x << i : (x + 1) << i]
            if (cells == i - 1).all() and (best is None or cost < best[0]):
                best = (cost, i, y, x)
        assert best is not None
        _, i, y, x = best
        scale_map[y << i : (y + 1) << i, x << i : (x + 1) << i] = i
    return scale_map


@settings(max_examples=60, deadline=None)
@given(scored_grids(max_scales=3), st.floats(0.01, 1.0))
def test_share_gives_all_images_the_same_count_nearest_to_the_wish(
    case: tuple[tuple[int, int], int, int, Scores], keep: float
) -> None:
    grid, num_scales, batch, scores = case
    cells = grid[0] * grid[1]
    available = sum((grid[0] >> i) * (grid[1] >> i) for i in range(1, num_scales))
    wished = merges_wished(grid, keep)
    if abs(cells - 3 * wished - keep * cells) > 1.499:  # half-way between two: either is right
        return
    if wished > available:
        with pytest.raises(ValueError, match=f"below the least share .* grid of {cells} patches"):
            choose_scales(scores, Budget(keep=keep), grid, batch)
        return
    layout = PatchLayout.from_scale_map(choose_scales(scores, Budget(keep=keep), grid, batch), 16, num_scales)
    assert len(set(layout.seqlens)) == 1
    assert abs(layout.seqlens[0] - keep * cells) <= abs(cells - 3 * wished - keep * cells) + 1e-6


@settings(max_examples=60, deadline=None)
@given(scored_grids(max_scales=4), st.floats(0.1, 1.0), st.integers(0, 2**31))
def test_share_merges_what_a_greedy_search_merges(
    case: tuple[tuple[int, int], int, int, Scores], keep: float, seed: int
) -> None:
    grid, num_scales, batch, scores = case
    # distinct scores, so that there is one answer
    random = torch.Generator().manual_seed(seed)
    scores = {factor: torch.rand(one.shape, generator=random) for factor, one in scores.items()}
    available = sum((grid[0] >> i) * (grid[1] >> i) for i in range(1, num_scales))
    merges = min(merges_wished(grid, keep), available)
    keep = 1 - 3 * merges / (grid[0] * grid[1])
    if keep <= 0:
        return
    scale_map = choose_scales(scores, Budget(keep=keep), grid, batch)
    for image in range(batch):
        np.testing.assert_array_equal(scale_map[image].numpy(), share_by_hand(grid, scores, merges, image))


@settings(max_examples=40, deadline=None)
@given(scored_grids(max_scales=4), st.floats(0.2, 1.0))
def test_share_merges_nothing_dearer_than_what_it_leaves(
    case: tuple[tuple[int, int], int, int, Scores], keep: float
) -> None:
    """Also with ties: each merged patch, and all inside it, score no higher than any 2x patch that stays fine."""
    grid, num_scales, batch, scores = case
    if num_scales == 1:
        return
    try:
        scale_map = choose_scales(scores, Budget(keep=keep), grid, batch)
    except ValueError:
        return
    for image in range(batch):
        fine, merged = [], []
        for y in range(grid[0] // 2):
            for x in range(grid[1] // 2):
                is_fine = int(scale_map[image, 2 * y, 2 * x]) == 0
                (fine if is_fine else merged).append(float(scores[2][image, y, x]))
        for i in range(2, num_scales):
            for y in range(grid[0] >> i):
                for x in range(grid[1] >> i):
                    if int(scale_map[image, y << i, x << i]) >= i:
                        merged.append(float(scores[2**i][image, y, x]))
        if fine and merged:
            assert max(merged) <= min(fine)


@pytest.mark.parametrize("grid", [(2, 2), (3, 9), (9, 2)])
def test_share_of_a_grid_that_holds_no_patch_of_the_largest_scale(grid: tuple[int, int]) -> None:
    scores = {2**i: torch.rand(2, grid[0] >> i, grid[1] >> i) for i in (1, 2, 3)}
    cells = grid[0] * grid[1]
    scale_map = choose_scales(scores, Budget(keep=1 - 3 / cells), grid, 2)
    assert (scale_map == 1).sum((1, 2)).tolist() == [4, 4]
    assert (scale_map == 0).sum((1, 2)).tolist() == [cells - 4] * 2


def test_share_of_one_scale_or_of_everything_is_the_uniform_grid() -> None:
    assert (choose_scales({}, Budget(keep=1.0), (3, 5), 2) == 0).all()
    assert (choose_scales({2: torch.zeros(1, 2, 2)}, Budget(keep=1.0), (4, 4), 1) == 0).all()


def test_a_share_out_of_reach_names_what_is_possible() -> None:
    scores = {2: torch.rand(1, 3, 3)}
    with pytest.raises(ValueError, match=r"keep=0\.1 .* grid of 49 patches \(0\.449\)"):
        choose_scales(scores, Budget(keep=0.1), (7, 7), 1)
    assert (choose_scales(scores, Budget(keep=22 / 49), (7, 7), 1)[0, :6, :6] == 1).all()
    with pytest.raises(ValueError, match=r"grid of 16 patches \(1\.000\)"):
        choose_scales({}, Budget(keep=0.5), (4, 4), 1)


# Packing


# Limits

Case = tuple[tuple[int, int], int, int, Scores]


def tokens_of(scale_map: torch.Tensor) -> list[int]:
    """Patch tokens of each image, counted patch by patch."""
    counts = []
    for one in scale_map.numpy():
        covered = np.zeros(one.shape, dtype=bool)
        count = 0
        for y, x in np.ndindex(one.shape):
            if not covered[y, x]:
                side = 2 ** int(one[y, x])
                assert y % side == 0 and x % side == 0 and not covered[y : y + side, x : x + side].any()
                covered[y : y + side, x : x + side] = True
                count += 1
        counts.append(count)
    return counts


def available_merges(grid: tuple[int, int], num_scales: int) -> int:
    return sum((grid[0] >> i) * (grid[1] >> i) for i in range(1, num_scales))


@settings(max_examples=120, deadline=None)
@given(scored_grids(max_scales=3), threshold_lists(), st.integers(1, 90), st.integers(0, 3))
def test_no_image_exceeds_its_cap_and_those_within_it_stay_as_they_are(
    case: Case, thresholds: list[float], cap: int, prefix: int
) -> None:
    grid, num_scales, batch, scores = case
    free = scales_from_thresholds(scores, thresholds[: num_scales - 1], grid, batch)
    budget = Budget(tuple(thresholds[: num_scales - 1]), max_tokens=cap)
    least = grid[0] * grid[1] - 3 * available_merges(grid, num_scales) + prefix
    if cap < least:
        with pytest.raises(ValueError, match=f"max_tokens={cap} cannot be reached.*at least {least} tokens"):
            choose_within_limits([scores], [grid], [batch], budget, prefix)
        return
    (capped,) = choose_within_limits([scores], [grid], [batch], budget, prefix)
    for image, (before, after) in enumerate(zip(tokens_of(free), tokens_of(capped), strict=True)):
        assert after + prefix <= cap
        if before + prefix <= cap:
            assert torch.equal(capped[image], free[image])
        else:
            assert cap - 2 <= after + prefix  # no more is merged than has to be


@settings(max_examples=120, deadline=None)
@given(scored_grids(max_scales=3), threshold_lists(), st.floats(0, 1))
def test_no_image_falls_below_its_floor(case: Case, thresholds: list[float], floor: float) -> None:
    grid, num_scales, batch, scores = case
    free = scales_from_thresholds(scores, thresholds[: num_scales - 1], grid, batch)
    budget = Budget(tuple(thresholds[: num_scales - 1]), min_keep=floor)
    (kept,) = choose_within_limits([scores], [grid], [batch], budget)
    num_patches = grid[0] * grid[1]
    for image, (before, after) in enumerate(zip(tokens_of(free), tokens_of(kept), strict=True)):
        assert after >= floor * num_patches - 1e-6
        if before >= floor * num_patches:
            assert torch.equal(kept[image], free[image])
        else:
            assert after <= floor * num_patches + 3


@settings(max_examples=120, deadline=None)
@given(st.lists(scored_grids(max_scales=3), min_size=1, max_size=3), threshold_lists(), st.integers(1, 400), st.data())
def test_no_batch_exceeds_its_cap(cases: list[Case], thresholds: list[float], cap: int, data: st.DataObject) -> None:
    num_scales = cases[0][1]
    groups = [(grid, batch, scores) for grid, scales, batch, scores in cases if scales == num_scales]
    grids, batches, scores = (list(part) for part in zip(*groups, strict=True))
    floor = data.draw(st.sampled_from([0.0, 0.5, 0.8]))
    prefix = data.draw(st.integers(0, 2))
    by = tuple(thresholds[: num_scales - 1])
    free = choose_within_limits(scores, grids, batches, Budget(by, min_keep=floor), prefix)
    budget = Budget(by, min_keep=floor, max_batch_tokens=cap)
    images = sum(batches)
    least = sum(
        batch * (prefix + grid[0] * grid[1] - 3 * available_merges(grid, num_scales)) for grid, batch, _ in groups
    )
    if cap < least:
        with pytest.raises(ValueError, match=f"max_batch_tokens={cap} cannot be reached.*at least {least} tokens"):
            choose_within_limits(scores, grids, batches, budget, prefix)
        return
    capped = choose_within_limits(scores, grids, batches, budget, prefix)
    before = [tokens for one in free for tokens in tokens_of(one)]
    after = [tokens for one in capped for tokens in tokens_of(one)]
    total = sum(after) + images * prefix
    assert total <= cap
    assert all(a <= b for a, b in zip(after, before, strict=True))
    if sum(before) + images * prefix <= cap:
        assert after == before
    else:
        assert total >= cap - 2
    # The floor gives way only where keeping to it everywhere could not do.
    floors = [grid[0] * grid[1] - 3 * max(0, math.floor((1 - floor) * grid[0] * grid[1] / 3 + 1e-9)) for grid in grids]
    at_floor = [
        max(tokens, grid[0] * grid[1] - 3 * available_merges(grid, num_scales))
        for grid, tokens in zip(grids, floors, strict=True)
    ]
    if sum(batch * tokens for batch, tokens in zip(batches, at_floor, strict=True)) + images * prefix <= cap:
        each = [tokens for batch, tokens in zip(batches, at_floor, strict=True) for _ in range(batch)]
        assert all(tokens >= lowest for tokens, lowest in zip(after, each, strict=True))


def test_a_cap_on_the_batch_merges_the_cheapest_wherever_it_is() -> None:
    scores = {2: torch.tensor([[[5.0, 1.0], [7.0, 9.0]], [[4.0, 2.0], [8.0, 3.0]]])}
    (scale_map,) = choose_within_limits([scores], [(4, 4)], [2], Budget((0.0,), max_batch_tokens=20))
    assert tokens_of(scale_map) == [13, 7]  # 1, 2, 3, 4 are merged
    assert scale_map[:, ::2, ::2].tolist() == [[[0, 1], [0, 0]], [[1, 1], [0, 1]]]


@settings(max_examples=60, deadline=None)
@given(scored_grids(max_scales=3), threshold_lists(), st.floats(0.4, 1), st.floats(0, 1))
def test_a_blend_lies_between_thresholds_and_share(
    case: Case, thresholds: list[float], keep: float, blend: float
) -> None:
    grid, num_scales, batch, scores = case
    if num_scales == 1:
        return
    by = tuple(thresholds[: num_scales - 1])
    try:
        by_share = tokens_of(choose_scales(scores, Budget(keep=keep), grid, batch))
    except ValueError:
        return
    by_thresholds = tokens_of(scales_from_thresholds(scores, by, grid, batch))
    (blended,) = choose_within_limits([scores], [grid], [batch], Budget(by, keep, blend))
    for got, one, other in zip(tokens_of(blended), by_thresholds, by_share, strict=True):
        assert abs(got - ((1 - blend) * one + blend * other)) <= 1.5001
    if blend == 1:
        assert len(set(tokens_of(blended))) == 1


@settings(max_examples=60, deadline=None)
@given(scored_grids(), st.integers(-1, 6))
def test_merge_costs_count_what_a_threshold_merges(case: Case, threshold: int) -> None:
    grid, num_scales, batch, scores = case
    costs = merge_costs(scores, batch)
    assert costs.shape == (batch, available_merges(grid, num_scales))
    scale_map = scales_from_thresholds(scores, [float(threshold)] * (num_scales - 1), grid, batch)
    merges = (costs < threshold).sum(1).tolist()
    assert [grid[0] * grid[1] - 3 * n for n in merges] == tokens_of(scale_map)


def test_each_image_may_have_its_own_number_of_merges() -> None:
    scores = {2: torch.tensor([[[5.0, 1.0]], [[4.0, 2.0]], [[4.0, 2.0]]])}
    order = MergeOrder(scores, (2, 4), 3)
    assert tokens_of(order.scale_map(torch.tensor([0, 1, 2]))) == [8, 5, 2]
    assert torch.equal(order.scale_map(1), order.scale_map(torch.tensor([1, 1, 1])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.5}, "keep=1.5 must be a share"),
        ({"thresholds": (1.0,), "keep": 0.5}, "not both"),
        ({"thresholds": (1.0,), "keep": 0.5, "blend": 1.5}, "blend=1.5 must be in"),
        ({"keep": 0.5, "blend": 0.5}, "needs both thresholds and keep"),
        ({"thresholds": (1.0,), "min_keep": -0.1}, "min_keep=-0.1 must be a share"),
        ({"keep": 0.3, "min_keep": 0.5}, "min_keep=0.5 is above keep=0.3"),
        ({"thresholds": (1.0,), "max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"thresholds": (1.0,), "max_batch_tokens": -5}, "max_batch_tokens=-5 must be at least 1"),
        ({"thresholds": (float("nan"),)}, "thresholds must be numbers"),
    ],
)
def test_budgets_that_contradict_themselves_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**options)
