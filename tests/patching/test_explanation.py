"""What is said about a pixel agrees with the layout that was made, and with the rules written in numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from skimage import data

from aptvit.calibration.calibrator import calibrate
from aptvit.patching.explanation import Explanation, explain
from aptvit.patching.patchifier import Patchifier

P = 8


def photo(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8, part smooth and part busy."""
    return torch.from_numpy(data.astronaut()[:height, :width].copy()).permute(2, 0, 1)


def every_pixel(patchifier: Patchifier, image: torch.Tensor, step: int = 4) -> list[Explanation]:
    return [
        explain(patchifier, image, x, y) for y in range(0, image.shape[1], step) for x in range(0, image.shape[2], step)
    ]


def check_against_the_layout(patchifier: Patchifier, image: torch.Tensor, found: list[Explanation]) -> None:
    layout = patchifier(patchifier.groups([image]))
    owner = np.full(image.shape[1:], -1)
    patches = layout.patches(0).numpy()
    for number, (top, left, size) in enumerate(patches):
        owner[top : top + size, left : left + size] = number
    for one in found:
        top, left, size = patches[owner[one.y, one.x]]
        assert (one.patch.top, one.patch.left, one.patch.size) == (top, left, size)
        assert sum(candidate.chosen for candidate in one.candidates) == 1
        assert all(c.left <= one.x < c.left + c.size and c.top <= one.y < c.top + c.size for c in one.candidates)
        assert [c.size for c in one.candidates] == [P << i for i in range(patchifier.num_scales - 1, -1, -1)]


def entropies(image: torch.Tensor, size: int) -> np.ndarray:
    """Scores of the candidates of a size, which `tests/patching/kernels` holds against the formula."""
    ((_, scores),) = Patchifier(P, thresholds=(9.0, 9.0)).scores([image])
    return scores[size // P][0].numpy()


@pytest.mark.parametrize(("height", "width"), [(96, 128), (88, 104)])
@pytest.mark.parametrize("thresholds", [(4.5, 4.0), (6.0, 5.5), (-1.0, 5.0), (9.0, 9.0)])
def test_thresholds(height: int, width: int, thresholds: tuple[float, float]) -> None:
    image = photo(height, width)
    patchifier = Patchifier(P, thresholds=thresholds)
    found = every_pixel(patchifier, image)
    check_against_the_layout(patchifier, image, found)
    scores = {size: entropies(image, size) for size in (2 * P, 4 * P)}
    for one in found:
        coarse, middle, base = one.candidates
        allowed = []
        for candidate, threshold in ((coarse, thresholds[1]), (middle, thresholds[0])):
            row, col = one.y // candidate.size, one.x // candidate.size
            rows, cols = scores[candidate.size].shape
            if row >= rows or col >= cols:
                assert candidate.score is None and candidate.limit is None and not candidate.allowed
                continue
            assert candidate.score == candidate.cost == scores[candidate.size][row, col]
            assert candidate.limit == threshold and candidate.allowed == (candidate.score < threshold)
            if candidate.allowed:
                allowed.append(candidate.size)
            expected = np.pad(scores[candidate.size], 1, constant_values=math.nan)[row : row + 3, col : col + 3]
            got = np.array(candidate.neighbours, dtype=float)
            np.testing.assert_array_equal(got, expected)
        assert one.rule == "thresholds" and one.patch.size == max(allowed, default=P)
        assert base.score is None and base.allowed and base.neighbours == ()


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.5, 0.3])
def test_a_share_is_the_cut_that_it_amounts_to_in_this_image(keep: float) -> None:
    image = photo(96, 128)
    patchifier = Patchifier(P, keep=keep, scales=3)
    found = every_pixel(patchifier, image)
    check_against_the_layout(patchifier, image, found)
    fine, coarse = entropies(image, 2 * P), entropies(image, 4 * P)
    inside = fine.reshape(coarse.shape[0], 2, coarse.shape[1], 2).max((1, 3))
    costs = {2 * P: fine, 4 * P: np.maximum(coarse, inside)}
    merges = round((1 - keep) * (96 // P) * (128 // P) / 3)
    ordered = np.sort(np.concatenate([costs[2 * P].ravel(), costs[4 * P].ravel()]))
    for one in found:
        assert one.rule == "share" and one.merges == merges
        for candidate in one.candidates[:-1]:
            cost = costs[candidate.size][one.y // candidate.size, one.x // candidate.size]
            assert candidate.cost == cost and candidate.limit == ordered[merges]
            if cost != candidate.limit:
                assert candidate.allowed == (cost < ordered[merges])
        assert one.patch.size == max(c.size for c in one.candidates if c.allowed)


@pytest.mark.parametrize("limits", [{"blend": 0.5, "keep": 0.6}, {"min_keep": 0.8}, {"max_tokens": 60}])
def test_limits_move_the_cut(limits: dict[str, float]) -> None:
    image = photo(96, 128)
    patchifier = Patchifier(P, thresholds=(5.0, 5.0), **limits)
    found = every_pixel(patchifier, image)
    check_against_the_layout(patchifier, image, found)
    assert {one.rule for one in found} == {"share"}
    patchifier = Patchifier(P, thresholds=(5.0, 5.0), min_keep=0.01)
    assert explain(patchifier, image, 0, 0).rule == "thresholds"  # the limit changes nothing here


def test_thresholds_that_calibration_found() -> None:
    image = photo(96, 128)
    patchifier = Patchifier(P, scales=3)
    thresholds = calibrate(patchifier, [image], keep=0.5)
    found = every_pixel(patchifier, image)
    check_against_the_layout(patchifier, image, found)
    assert {c.limit for one in found for c in one.candidates[:-1] if c.score is not None} == set(thresholds)


def test_pixels_outside_are_refused_and_json_has_no_infinity() -> None:
    image = photo(96, 128)
    patchifier = Patchifier(P, thresholds=(5.0,))
    for x, y in ((128, 0), (0, 96), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"outside the image of 128 x 96 pixels"):
            explain(patchifier, image, x, y)
    everything = Patchifier(P, keep=0.25, scales=2)  # all 48 merges are made: nothing is left to be the cut
    one = explain(everything, image, 5, 5)
    assert one.merges == 48 and one.candidates[0].limit == math.inf
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["candidates"][0]["limit"] is None
