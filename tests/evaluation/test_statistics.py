"""Answers against numpy, intervals against the formulas that they approximate, equal time against interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aptvit.evaluation.statistics import (
    Point,
    agrees,
    bootstrap_mean,
    difference_at_equal_time,
    is_correct,
)

NORMAL = 1.959964  # half the width of a 95 % interval, in standard errors
TIMES = (0.5, 0.7, 0.8, 1.0)

# Answers


def test_correct_answers_are_those_of_a_sorted_list() -> None:
    logits, labels = torch.randn(200, 12), torch.randint(12, (200,))
    for k in (1, 5, 12, 50):
        ranks = np.argsort(-logits.numpy(), axis=1)[:, :k]
        expected = [label in row for row, label in zip(ranks, labels.numpy(), strict=True)]
        assert is_correct(logits, labels, k).tolist() == expected


def test_equal_logits_name_the_lower_class() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    assert is_correct(logits, torch.tensor([0])).tolist() == [True]
    assert is_correct(logits, torch.tensor([1])).tolist() == [False]


def test_agreement_is_of_the_first_answer() -> None:
    first, second = torch.randn(100, 7), torch.randn(100, 7)
    expected = first.numpy().argmax(1) == second.numpy().argmax(1)
    assert agrees(first, second).numpy().tolist() == expected.tolist()
    assert agrees(first, 3 * first + 1).all()


# Intervals


def test_a_share_has_the_interval_of_the_binomial_distribution() -> None:
    values = np.arange(500) < 390  # 78 %
    found = bootstrap_mean(values, samples=40_000)
    error = NORMAL * np.sqrt(0.78 * 0.22 / 500)
    assert found.mean == 0.78
    assert (found.low, found.high) == pytest.approx((0.78 - error, 0.78 + error), abs=0.0025)


def test_a_paired_difference_has_the_interval_of_the_differences() -> None:
    random = np.random.default_rng(1)
    hard = random.random(2000)  # both methods fail on the same images
    adaptive, baseline = (hard < 0.80).astype(float), (hard + random.normal(0, 0.02, 2000) < 0.78).astype(float)
    differences = adaptive - baseline
    found = bootstrap_mean(differences)
    error = NORMAL * differences.std() / np.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((found.mean - error, found.mean + error), abs=0.001)
    apart = NORMAL * np.sqrt((adaptive.var() + baseline.var()) / 2000)
    assert found.high - found.low < apart  # less than half of what comparing two intervals would ask for
    assert found.low > 0 > bootstrap_mean(random.normal(0, 1, 100)).low


def test_drawing_distinct_values_is_drawing_images() -> None:
    values = np.random.default_rng(2).choice([-1.0, -0.25, 0.0, 0.75], size=60)
    draws = np.random.default_rng(3).integers(60, size=(20_000, 60))
    expected = np.quantile(values[draws].mean(1), [0.025, 0.975])
    found = bootstrap_mean(values, samples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


def test_the_draws_are_the_same_in_each_call() -> None:
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_mean(values) == bootstrap_mean(values.copy())


def test_what_does_not_vary_has_no_width() -> None:
    found = bootstrap_mean(np.ones(10, dtype=bool))
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(("values", "samples"), [([], 10), ([1.0], 0)])
def test_what_has_no_interval_is_refused(values: list[float], samples: int) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        bootstrap_mean(np.array(values), samples)


# Equal time


@pytest.fixture
def curve() -> list[Point]:
    random = np.random.default_rng(0)
    return [Point(time, (random.random(40) < 0.6 + 0.3 * time).astype(float)) for time in TIMES]


@pytest.mark.parametrize("time", [0.5, 0.5001, 0.6, 0.7, 0.75, 0.93, 1.0])
def test_scores_between_two_settings_are_on_a_straight_line(curve: list[Point], time: float) -> None:
    for image in range(40):  # scores of one image alone
        only = [Point(point.time, point.scores[[image]]) for point in curve]
        expected = np.interp(time, TIMES, [point.scores[0] for point in only])
        for settings in (only, only[::-1]):
            found, reason = difference_at_equal_time(Point(time, np.zeros(1)), settings)
            assert found is not None and found.mean == pytest.approx(-expected) and reason == ""


def test_beyond_the_settings_nothing_is_made_up(curve: list[Point]) -> None:
    for settings, time, expected in ((curve, 0.49, "that fast"), (curve, 1.01, "that slow"), ([], 1.0, "that fast")):
        found, reason = difference_at_equal_time(Point(time, np.ones(40)), settings)
        assert found is None and reason.endswith(expected)


def test_the_difference_is_the_mean_of_differences_image_by_image(curve: list[Point]) -> None:
    ours = Point(0.65, (np.arange(40) % 7 > 0).astype(float))
    differences = ours.scores - (0.25 * curve[0].scores + 0.75 * curve[1].scores)
    found, _ = difference_at_equal_time(ours, curve)
    error = 1.96 * differences.std() / np.sqrt(40)
    assert found is not None and found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - error, found.mean + error), abs=0.015)


def test_a_method_against_itself_differs_by_nothing(curve: list[Point]) -> None:
    found, _ = difference_at_equal_time(curve[1], curve)
    assert found is not None and (found.mean, found.low, found.high) == (0, 0, 0)


def test_other_images_do_not_pair_up(curve: list[Point]) -> None:
    with pytest.raises(ValueError, match="40"):
        difference_at_equal_time(Point(0.6, np.ones(41)), curve)
