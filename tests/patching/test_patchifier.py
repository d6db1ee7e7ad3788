from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from aptvit.patching.patchifier import Patchifier


def layout_of(patchifier: Patchifier, images: Any) -> Any:
    return patchifier(patchifier.groups(images))


def test_thresholds_decide_by_the_entropy_of_each_patch(photo_batch: Tensor) -> None:
    patchifier = Patchifier(16, thresholds=(5.0, 4.0))
    layout = layout_of(patchifier, photo_batch)
    ((_, scores),) = patchifier.scores(photo_batch)
    for image in range(len(photo_batch)):
        for y, x, side in layout.patches(image).tolist():
            if side > 16:
                scale = int(math.log2(side // 16))
                assert scores[side // 16][image, y // side, x // side] < (5.0, 4.0)[scale - 1]
            else:
                assert scores[2][image, y // 32, x // 32] >= 5.0
                assert scores[4][image, y // 64, x // 64] >= 4.0
    assert 0 < layout.keep_ratio < 1 and len(set(layout.seqlens)) > 1


def test_keep_gives_every_image_the_same_count(photo_batch: Tensor) -> None:
    layout = layout_of(Patchifier(16, keep=0.5, scales=3, num_prefix_tokens=2), photo_batch)
    assert set(layout.seqlens) == {2 + 31}  # 64 - 3 * 11, the nearest to 32
    assert layout.num_scales == 3


def test_a_list_of_different_sizes_is_cut_as_each_image_by_itself(photos: list[Tensor]) -> None:
    images = [photo[:, : 16 * (5 + i % 3), : 16 * (4 + i % 2)] for i, photo in enumerate(photos)] * 2
    patchifier = Patchifier(16, thresholds=(6.0, 5.0), num_prefix_tokens=1)
    joint = layout_of(patchifier, images)
    assert joint.grid_sizes == [(image.shape[1] // 16, image.shape[2] // 16) for image in images]
    for i, image in enumerate(images):
        separate = layout_of(patchifier, image[None])
        assert torch.equal(joint.patches(i), separate.patches(0))
        assert joint.seqlens[i] == separate.seqlens[0]
        rows, cols = joint.grid_sizes[i]
        assert torch.equal(joint.scale_map[i, :rows, :cols], separate.scale_map[0])
        assert (joint.scale_map[i, rows:] == -1).all() and (joint.scale_map[i, :, cols:] == -1).all()


def test_padding_cuts_the_padded_image() -> None:
    layout = layout_of(Patchifier(16, thresholds=1.0, pad=True), torch.rand(1, 3, 50, 33))
    assert layout.grid_sizes == [(4, 3)]
    with pytest.raises(ValueError, match="multiples of the patch size"):
        layout_of(Patchifier(16, thresholds=1.0), torch.rand(1, 3, 50, 33))


def test_one_scale_needs_no_scores() -> None:
    def never(*_: object) -> dict[int, Tensor]:
        raise AssertionError("scored")

    for patchifier in (Patchifier(16, scales=1, scorer=never), Patchifier(16, thresholds=(), scorer=never)):
        assert patchifier.num_scales == 1
        assert layout_of(patchifier, torch.rand(2, 3, 48, 32)).keep_ratio == 1
    for nothing in ({"keep": 1.0}, {"thresholds": (-1.0, -0.5)}, {}):
        assert layout_of(Patchifier(16, scorer=never, **nothing), torch.rand(2, 3, 48, 32)).keep_ratio == 1
    with pytest.raises(AssertionError, match="scored"):
        layout_of(Patchifier(16, thresholds=(-1.0, 0.0), scorer=never), torch.rand(2, 3, 64, 64))


def test_budget_of_the_constructor() -> None:
    assert (Patchifier(16).budget.thresholds, Patchifier(16).budget.keep, Patchifier(16).num_scales) == (
        (-1.0,),
        None,
        2,
    )
    assert Patchifier(16, scales=4).budget.thresholds == (-1.0,) * 3
    assert (Patchifier(16, thresholds=5).budget.thresholds, Patchifier(16, thresholds=5).num_scales) == ((5.0,), 2)
    assert Patchifier(16, thresholds=[5, 4.5], scales=3).budget.thresholds == (5.0, 4.5)
    kept = Patchifier(16, keep=0.5)
    assert (kept.budget.thresholds, kept.budget.keep, kept.num_scales) == (None, 0.5, 2)
    assert Patchifier(16, keep=1, scales=3).num_scales == 3


def test_budget_can_be_set_at_any_time() -> None:
    patchifier = Patchifier(16, thresholds=(5.0, 4.0))
    patchifier.budget = patchifier.budget.with_keep(0.4)
    assert (patchifier.budget.thresholds, patchifier.budget.keep, patchifier.num_scales) == (None, 0.4, 3)
    patchifier.budget = patchifier.budget.with_thresholds(3)
    assert (patchifier.budget.thresholds, patchifier.budget.keep, patchifier.num_scales) == ((3.0,), None, 2)
    patchifier.budget = patchifier.budget.with_thresholds([1.0, 2.0, 3.0])
    assert patchifier.num_scales == 4


@pytest.mark.parametrize("value", [0, -0.1, 1.5, math.nan])
def test_a_share_out_of_range_is_refused_and_changes_nothing(value: float) -> None:
    patchifier = Patchifier(16, thresholds=5.0)
    with pytest.raises(ValueError, match="must be a share"):
        patchifier.budget = patchifier.budget.with_keep(value)
    assert (patchifier.budget.thresholds, patchifier.budget.keep) == ((5.0,), None)
    with pytest.raises(ValueError, match="must be a share"):
        Patchifier(16, keep=value)


@pytest.mark.parametrize("value", [math.nan, (1.0, math.nan), ("5",), "55", (None,), (torch.zeros(2),)])
def test_thresholds_that_are_not_numbers_are_refused_and_change_nothing(value: Any) -> None:
    patchifier = Patchifier(16, keep=0.5, scales=3)
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        patchifier.budget = patchifier.budget.with_thresholds(value)
    assert (patchifier.budget.thresholds, patchifier.budget.keep, patchifier.num_scales) == (None, 0.5, 3)
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        Patchifier(16, thresholds=value)


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        Patchifier(16, thresholds=5.0, keep=0.5)
    with pytest.raises(ValueError, match=r"1 thresholds make 2 scales, not scales=3"):
        Patchifier(16, thresholds=5.0, scales=3)
    with pytest.raises(ValueError, match="scales=0"):
        Patchifier(16, scales=0)
    with pytest.raises(ValueError, match="2 values for 3 channels"):
        Patchifier(16, mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="std"):
        Patchifier(16, std=(0.5,) * 4)
    with pytest.raises(ValueError, match="unknown scorer"):
        Patchifier(16, scorer="variance")


def test_raw_pixels_are_normalised() -> None:
    patchifier = Patchifier(16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.25))
    raw = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for c, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.4), (0.3, 0.25)]):
        torch.testing.assert_close(
            patchifier.normalization.normalised(raw)[:, c], (raw[:, c].double() / 255 - mean).float() / std
        )
    images = torch.rand(2, 3, 16, 16)
    assert patchifier.normalization.normalised(images) is images


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pixels, patch, factors: {},
        lambda pixels, patch, factors: {f: torch.zeros(len(pixels), 1, 1) for f in factors},
        lambda pixels, patch, factors: {f: torch.zeros(4 // f, 6 // f) for f in factors},
        lambda pixels, patch, factors: {2: torch.zeros(len(pixels), 2, 3)},
        lambda pixels, patch, factors: {2: torch.zeros(len(pixels), 2, 3), "4": torch.zeros(len(pixels), 1, 1)},
        lambda pixels, patch, factors: {f: torch.zeros(len(pixels), 4 // f, 6 // f).numpy() for f in factors},
        lambda pixels, patch, factors: {f: None for f in factors},
        lambda pixels, patch, factors: [torch.zeros(len(pixels), 4 // f, 6 // f) for f in factors],
        lambda pixels, patch, factors: torch.zeros(len(pixels), 2, 3),
        lambda pixels, patch, factors: None,
    ],
)
def test_what_a_scorer_returns_wrongly_is_told_by_shape(wrong: Any) -> None:
    patchifier = Patchifier(16, thresholds=(1.0, 1.0), scorer=wrong)
    expected = re.escape("here of shapes {2: (2, 2, 3), 4: (2, 1, 1)}; it returned ")
    with pytest.raises(ValueError, match=expected + r"(\(2, 2, 3\)|a list|a NoneType|\{.*\})$"):
        layout_of(patchifier, torch.rand(2, 3, 64, 96))


@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"thresholds": 1.0}, {"thresholds": 1.0, "min_keep": 0.1}], ids=str)
def test_nan_scores_are_refused_and_infinite_scores_are_not(budget: Any) -> None:
    def scorer(pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        scores = {f: pixels[:, 0, :: f * patch_size, :: f * patch_size] for f in factors}
        return {f: score.where(score > 0, math.inf).where(score < 200, math.nan) for f, score in scores.items()}

    patchifier = Patchifier(16, scorer=scorer, **budget)
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    layout_of(patchifier, images)
    images[1] = 255
    with pytest.raises(ValueError, match="image 1 got NaN scores"):
        layout_of(patchifier, images)
    with pytest.raises(ValueError, match="image 2 got NaN scores"):
        layout_of(patchifier, [images[0], torch.zeros(3, 32, 64, dtype=torch.uint8), images[1]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_image_with_nan_or_infinite_pixels_is_named(bad: float) -> None:
    images = torch.rand(3, 3, 32, 32)
    images[1, 2, 3, 4] = bad
    patchifier = Patchifier(16, thresholds=1.0)
    with pytest.raises(ValueError, match="image 1 holds NaN or infinite pixels"):
        layout_of(patchifier, images)
    mixed = [torch.rand(3, 16, 32), torch.rand(3, 32, 32), torch.rand(3, 16, 32), images[1]]
    with pytest.raises(ValueError, match="image 3 holds NaN or infinite pixels"):
        layout_of(patchifier, mixed)


def test_scores_come_by_group() -> None:
    images = [torch.rand(3, 64, 64), torch.rand(3, 32, 64), torch.rand(3, 64, 64)]
    groups = Patchifier(16, thresholds=(1.0, 1.0)).scores(images)
    assert [(group.index, {f: tuple(s.shape) for f, s in scores.items()}) for group, scores in groups] == [
        ([0, 2], {2: (2, 2, 2), 4: (2, 1, 1)}),
        ([1], {2: (1, 1, 2), 4: (1, 0, 1)}),
    ]


def test_half_precision_images_and_autocast_do_not_change_the_decision(photo_batch: Tensor) -> None:
    patchifier = Patchifier(16, thresholds=(5.0, 4.0), mean=(0.5,), std=(0.5,))
    images = (photo_batch.float() / 255 - 0.5) / 0.5
    expected = layout_of(patchifier, images).scale_map
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layout_of(patchifier, images).scale_map, expected)
    ((_, exact),), ((_, rounded),) = patchifier.scores(images), patchifier.scores(images.half())
    assert rounded[2].dtype == torch.float32
    torch.testing.assert_close(rounded[2], exact[2], atol=0.3, rtol=0)
