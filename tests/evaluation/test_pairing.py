"""At equal time: against numpy's own interpolation, on made-up answers."""

from __future__ import annotations

import numpy as np
import pytest

from aptvit.evaluation.pairing import NotComparable, Point, difference_at_equal_time, scores_at

TIMES = (0.5, 0.7, 0.8, 1.0)


@pytest.fixture
def curve() -> list[Point]:
    random = np.random.default_rng(0)
    return [Point(time, (random.random(40) < 0.6 + 0.3 * time).astype(float)) for time in TIMES]


@pytest.mark.parametrize("time", [0.5, 0.5001, 0.6, 0.7, 0.75, 0.93, 1.0])
def test_scores_between_two_settings_are_on_a_straight_line(curve: list[Point], time: float) -> None:
    expected = [np.interp(time, TIMES, [point.scores[i] for point in curve]) for i in range(40)]
    np.testing.assert_allclose(scores_at(curve, time), expected, atol=1e-12)
    np.testing.assert_allclose(scores_at(curve[::-1], time), expected, atol=1e-12)


def test_beyond_the_settings_nothing_is_made_up(curve: list[Point]) -> None:
    with pytest.raises(NotComparable, match="that fast"):
        scores_at(curve, 0.49)
    with pytest.raises(NotComparable, match="that slow"):
        scores_at(curve, 1.01)
    with pytest.raises(NotComparable, match="that fast"):
        scores_at([], 1.0)


def test_the_difference_is_the_mean_of_differences_photo_by_photo(curve: list[Point]) -> None:
    ours = Point(0.65, (np.arange(40) % 7 > 0).astype(float))
    differences = ours.scores - (0.25 * curve[0].scores + 0.75 * curve[1].scores)
    found = difference_at_equal_time(ours, curve, samples=40_000)
    error = 1.96 * differences.std() / np.sqrt(40)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - error, found.mean + error), abs=0.015)


def test_a_method_against_itself_differs_by_nothing(curve: list[Point]) -> None:
    found = difference_at_equal_time(curve[1], curve)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_other_photos_do_not_pair_up(curve: list[Point]) -> None:
    with pytest.raises(ValueError, match="41 photos and 40"):
        difference_at_equal_time(Point(0.6, np.ones(41)), curve)
