from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scores, assert_same_layout, scored_grids, threshold_lists

from aptvit.data import record_stream
from aptvit.patching.layout import Packing, PatchLayout
from aptvit.patching.layouts import layout_of_images, uniform_layout
from aptvit.patching.selection import scales_from_thresholds


def layout_of(
    grid: tuple[int, int], num_scales: int, scores: Scores, thresholds: list[float], batch: int, prefix: int = 0
) -> PatchLayout:
    scale_map = scales_from_thresholds(scores, thresholds[: num_scales - 1], grid, batch)
    return PatchLayout.from_scale_map(scale_map, 16, num_scales, prefix)


@settings(max_examples=80, deadline=None)
@given(scored_grids(), threshold_lists(), st.integers(0, 5))
def test_every_cell_is_covered_once_and_the_numbers_add_up(
    case: tuple[tuple[int, int], int, int, Scores], thresholds: list[float], prefix: int
) -> None:
    grid, num_scales, batch, scores = case
    layout = layout_of(grid, num_scales, scores, thresholds, batch, prefix)
    painted = np.zeros((batch, *grid), dtype=int)
    counts = np.zeros((batch, num_scales), dtype=int)
    tokens = zip(*(t.tolist() for t in (layout.image, layout.scale, layout.row, layout.col)), strict=True)
    for image, scale, row, col in tokens:
        side = 2**scale
        assert row % side == 0 and col % side == 0
        assert row + side <= grid[0] and col + side <= grid[1]  # incomplete patches are never coarse
        painted[image, row : row + side, col : col + side] += 1
        assert (layout.scale_map[image, row : row + side, col : col + side] == scale).all()
        counts[image, scale] += 1
    assert (painted == 1).all()
    assert layout.counts == counts.tolist()
    assert layout.seqlens == (counts.sum(1) + prefix).tolist()
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, *np.cumsum(counts.sum(1) + prefix).tolist()]
    assert layout.packing.lengths_cpu.tolist() == [*layout.seqlens, max(layout.seqlens)]
    assert layout.num_patches == counts.sum() == len(layout.image)
    assert layout.num_tokens == counts.sum() + batch * prefix
    assert layout.max_seqlen == max(layout.seqlens)
    assert layout.num_images == batch and layout.num_scales == num_scales
    assert layout.keep_ratio == pytest.approx(counts.sum() / (batch * grid[0] * grid[1]))
    assert layout.grid_sizes == [grid] * batch


@settings(max_examples=60, deadline=None)
@given(scored_grids(), threshold_lists(), st.integers(0, 2))
def test_tokens_come_in_raster_order_and_can_be_put_back(
    case: tuple[tuple[int, int], int, int, Scores], thresholds: list[float], prefix: int
) -> None:
    grid, num_scales, batch, scores = case
    layout = layout_of(grid, num_scales, scores, thresholds, batch, prefix)
    order = list(zip(layout.image.tolist(), layout.row.tolist(), layout.col.tolist(), strict=True))
    assert order == sorted(order)
    # Give each packed row its own number, paint the numbers by hand, and compare with one gather.
    expected = np.zeros((batch, *grid), dtype=int)
    where: list[int] = []
    for image in range(batch):
        where += [int(layout.cu_seqlens[image]) + prefix + n for n in range(layout.seqlens[image] - prefix)]
    assert layout.patch_index.tolist() == where
    for position, image, scale, (_, row, col) in zip(
        where, layout.image.tolist(), layout.scale.tolist(), order, strict=True
    ):
        expected[image, row : row + 2**scale, col : col + 2**scale] = position
    np.testing.assert_array_equal(layout.restore_index.numpy(), expected)
    for image in range(batch):
        patches = layout.patches(image)
        mine = [
            (r * 16, c * 16, 16 * 2**s) for (i, r, c), s in zip(order, layout.scale.tolist(), strict=True) if i == image
        ]
        assert patches.tolist() == [list(one) for one in mine]
        assert [tuple(p[:2]) for p in patches.tolist()] == sorted(tuple(p[:2]) for p in patches.tolist())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3).flatmap(lambda s: st.tuples(st.just(s), st.sampled_from([2 ** (s - 1), 2**s, 3 * 2 ** (s - 1)]))),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 2**31),
)
def test_window_order_keeps_the_tokens_of_a_window_together(
    scales_and_window: tuple[int, int], windows: tuple[int, int], seed: int
) -> None:
    num_scales, window = scales_and_window
    grid = (windows[0] * window, windows[1] * window)
    random = torch.Generator().manual_seed(seed)
    scores = {2**i: torch.rand(2, grid[0] >> i, grid[1] >> i, generator=random) for i in range(1, num_scales)}
    scale_map = scales_from_thresholds(scores, [0.4] * (num_scales - 1), grid, 2)
    layout = PatchLayout.from_scale_map(scale_map, 16, num_scales, 1, window_size=window)
    keys = [
        (image, row // window, col // window, row % window, col % window)
        for image, row, col in zip(layout.image.tolist(), layout.row.tolist(), layout.col.tolist(), strict=True)
    ]
    assert keys == sorted(keys)
    plain = PatchLayout.from_scale_map(scale_map, 16, num_scales, 1)
    rows = zip(layout.image.tolist(), layout.scale.tolist(), layout.row.tolist(), layout.col.tolist(), strict=True)
    others = zip(plain.image.tolist(), plain.scale.tolist(), plain.row.tolist(), plain.col.tolist(), strict=True)
    assert sorted(rows) == sorted(others)  # the same patches in another order
    assert layout.seqlens == plain.seqlens
    assert torch.equal(layout.patches(1), plain.patches(1))  # for people, always in raster order
    # and a token still finds its way back to the cells it covers
    tokens = torch.full((layout.num_tokens,), -1)
    tokens[layout.patch_index] = layout.row * 1000 + layout.col
    expected = torch.zeros(2, *grid, dtype=torch.long)
    for image, scale, row, col in zip(
        plain.image.tolist(), plain.scale.tolist(), plain.row.tolist(), plain.col.tolist(), strict=True
    ):
        expected[image, row : row + 2**scale, col : col + 2**scale] = row * 1000 + col
    assert torch.equal(tokens[layout.restore_index], expected)


def test_windows_that_do_not_fit_are_refused() -> None:
    scale_map = torch.zeros(1, 8, 12, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"window of 6 .* multiple of 4"):
        PatchLayout.from_scale_map(scale_map, 16, 3, window_size=6)
    with pytest.raises(ValueError, match=r"8x12 .* whole windows of 8"):
        PatchLayout.from_scale_map(scale_map, 16, 3, window_size=8)


@pytest.mark.parametrize("num_scales", [1, 2, 3])
def test_negative_thresholds_give_the_uniform_grid_in_raster_order(num_scales: int) -> None:
    scores = {2**i: torch.zeros(2, 5 >> i, 7 >> i) for i in range(1, num_scales)}
    layout = layout_of((5, 7), num_scales, scores, [-1.0] * (num_scales - 1), 2)
    assert layout.keep_ratio == 1
    assert layout.row.view(2, 5, 7)[0].tolist() == [[y] * 7 for y in range(5)]
    assert layout.col.view(2, 5, 7)[1].tolist() == [list(range(7))] * 5
    assert layout.restore_index.flatten().tolist() == list(range(70))


def test_images_of_different_grids_share_one_layout() -> None:
    scale_map = torch.full((2, 4, 6), -1, dtype=torch.int8)
    scale_map[0, :2] = 1
    scale_map[1, :, :3] = 0
    layout = PatchLayout.from_scale_map(scale_map, 16, 2, 1, grid_sizes=[(2, 6), (4, 3)])
    assert layout.counts == [[0, 3], [12, 0]]
    assert layout.seqlens == [4, 13]
    assert layout.keep_ratio == pytest.approx(15 / 24)
    assert layout.restore_index[0].tolist() == [[1, 1, 2, 2, 3, 3]] * 2 + [[0] * 6] * 2
    assert layout.restore_index[1, :, :3].flatten().tolist() == list(range(5, 17))
    assert (layout.restore_index[1, :, 3:] == 0).all()


def test_an_image_that_is_not_finite_is_named() -> None:
    scale_map = torch.zeros(3, 2, 2, dtype=torch.int8)
    with pytest.raises(ValueError, match="image 2 holds NaN or infinite"):
        PatchLayout.from_scale_map(scale_map, 16, 1, finite=torch.tensor([True, True, False]))


# The same share for every image


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_packing_knows_the_run_of_each_token(seqlens: list[int]) -> None:
    packing = Packing.from_seqlens(seqlens)
    assert packing.num_tokens == sum(seqlens)
    assert packing.is_dense == (min(seqlens) == max(seqlens))
    expected = [run for run, length in enumerate(seqlens) for _ in range(length)]
    assert packing.sequence_of_token(sum(seqlens)).tolist() == expected
    assert packing.cu_seqlens.tolist() == [sum(seqlens[:n]) for n in range(len(seqlens) + 1)]


# Layouts out of other layouts


@st.composite
def mixed_layouts(draw: st.DrawFn) -> list[PatchLayout]:
    """Layouts of a model's batches: each of images of several sizes, padded to a common map."""
    num_scales, prefix = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    layouts = []
    for _ in range(draw(st.integers(1, 3))):
        grids = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
        scale_map = torch.full((len(grids), *map(max, *grids, (0, 0))), -1, dtype=torch.int8)
        for image, grid in enumerate(grids):
            scores = {2**i: torch.rand(1, grid[0] >> i, grid[1] >> i, generator=random) for i in range(1, num_scales)}
            mine = scales_from_thresholds(scores, [0.5] * (num_scales - 1), grid, 1)[0]
            scale_map[image, : grid[0], : grid[1]] = mine
        layouts.append(PatchLayout.from_scale_map(scale_map, 16, num_scales, prefix, grids))
    return layouts


@settings(max_examples=80, deadline=None)
@given(mixed_layouts(), st.data())
def test_a_batch_of_images_from_other_batches_has_the_layout_of_its_own_map(
    layouts: list[PatchLayout], data: st.DataObject
) -> None:
    images = [(layout, i) for layout in layouts for i in range(layout.num_images)]
    chosen = data.draw(st.lists(st.sampled_from(images), min_size=1, max_size=6))  # in any order, also twice
    grids = [layout.grid_sizes[i] for layout, i in chosen]
    scale_map = torch.full((len(chosen), *map(max, *grids, (0, 0))), -1, dtype=torch.int8)
    for image, ((layout, i), (rows, cols)) in enumerate(zip(chosen, grids, strict=True)):
        scale_map[image, :rows, :cols] = layout.scale_map[i, :rows, :cols]
    first = layouts[0]
    expected = PatchLayout.from_scale_map(scale_map, 16, first.num_scales, first.num_prefix_tokens, grids)
    got = layout_of_images(chosen)
    assert_same_layout(got, expected)
    for image, (layout, i) in enumerate(chosen):
        assert torch.equal(got.patches(image), layout.patches(i))
        assert (got.counts[image], got.seqlens[image]) == (layout.counts[i], layout.seqlens[i])


@settings(max_examples=40, deadline=None)
@given(mixed_layouts())
def test_all_images_of_a_layout_are_that_layout(layouts: list[PatchLayout]) -> None:
    for layout in layouts:
        assert_same_layout(layout_of_images([(layout, i) for i in range(layout.num_images)]), layout)


def test_with_known_counts_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {2: torch.rand(3, 4, 6), 4: torch.rand(3, 2, 3)}
    scale_map = scales_from_thresholds(scores, [0.5, 0.4], (8, 12), 3)
    expected = PatchLayout.from_scale_map(scale_map, 16, 3, 1)

    def never(*_: object) -> list[list[int]]:
        raise AssertionError("counted although the counts are known")

    monkeypatch.setattr("aptvit.patching.layout._count", never)
    got = PatchLayout.from_scale_map(scale_map, 16, 3, 1, counts=expected.counts)
    assert_same_layout(got, expected)
    got.counts[0][0] += 1  # nothing is shared with the other
    assert got.counts != expected.counts
    assert layout_of_images([(expected, 2), (expected, 0)]).counts == [expected.counts[2], expected.counts[0]]


def test_layouts_of_different_models_make_no_batch() -> None:
    scale_map = torch.zeros(1, 2, 2, dtype=torch.int8)
    one = PatchLayout.from_scale_map(scale_map, 16, 2, 1)
    for other in ((14, 2, 1), (16, 3, 1), (16, 2, 5)):
        with pytest.raises(ValueError, match=r"layouts with .* cannot be one batch"):
            layout_of_images([(one, 0), (PatchLayout.from_scale_map(scale_map, *other), 0)])
    with pytest.raises(ValueError, match="give at least one"):
        layout_of_images([])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 2, 4]), st.integers(0, 2))
def test_uniform_layouts_are_those_of_empty_maps(
    images: int, rows: int, cols: int, window_size: int | None, prefix: int
) -> None:
    grid = (rows * (window_size or 1), cols * (window_size or 1))
    got = uniform_layout(images, grid, 16, 2, prefix, window_size)
    empty = torch.zeros(images, *grid, dtype=torch.int8)
    counts = [[grid[0] * grid[1], 0]] * images
    expected = PatchLayout.from_scale_map(empty, 16, 2, prefix, window_size=window_size)
    assert expected.counts == counts
    for name in ("scale_map", "image", "scale", "row", "col", "patch_index", "restore_index"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.counts == expected.counts and got.grid_sizes == expected.grid_sizes
    assert got.seqlens == expected.seqlens and torch.equal(got.cu_seqlens, expected.cu_seqlens)
    assert (got.window_packing is None) == (expected.window_packing is None)
    if got.window_packing is not None and expected.window_packing is not None:
        assert got.window_packing.seqlens == expected.window_packing.seqlens


@pytest.mark.parametrize("window_size", [None, 4])
def test_a_stream_is_told_of_all_that_is_on_the_device(
    monkeypatch: pytest.MonkeyPatch, window_size: int | None
) -> None:
    layout = PatchLayout.from_scale_map(torch.zeros(2, 8, 8, dtype=torch.int8), 16, 2, 1, window_size=window_size)
    told: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(id(tensor)))
    record_stream(layout, "main")  # type: ignore[arg-type]
    values = list(vars(layout).values())
    packings = [one for one in values if isinstance(one, Packing)]
    held = [one for one in values if isinstance(one, torch.Tensor)] + [one.cu_seqlens for one in packings]
    assert len(packings) == (2 if window_size else 1)
    assert set(told) >= set(map(id, held))
