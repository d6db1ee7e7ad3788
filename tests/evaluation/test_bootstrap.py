"""Intervals against the formulas for what they approximate."""

from __future__ import annotations

import numpy as np
import pytest

from aptvit.evaluation.bootstrap import bootstrap_mean

NORMAL = 1.959964  # half the width of a 95 % interval, in standard errors


def test_a_share_has_the_interval_of_the_binomial_distribution() -> None:
    values = np.arange(500) < 390  # 78 %
    found = bootstrap_mean(values, samples=40_000)
    error = NORMAL * np.sqrt(0.78 * 0.22 / 500)
    assert found.mean == 0.78
    assert (found.low, found.high) == pytest.approx((0.78 - error, 0.78 + error), abs=0.0025)


def test_a_paired_difference_has_the_interval_of_its_own_spread() -> None:
    random = np.random.default_rng(1)
    hard = random.random(2000)  # both methods fail on the same photos
    ours, rival = (hard < 0.80).astype(float), (hard + random.normal(0, 0.02, 2000) < 0.78).astype(float)
    differences = ours - rival
    found = bootstrap_mean(differences)
    error = NORMAL * differences.std() / np.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((found.mean - error, found.mean + error), abs=0.001)
    apart = NORMAL * np.sqrt((ours.var() + rival.var()) / 2000)
    assert found.high - found.low < apart  # less than half of what comparing two intervals would ask for
    assert found.excludes_zero and not bootstrap_mean(random.normal(0, 1, 100)).excludes_zero


def test_drawing_distinct_values_is_drawing_photos() -> None:
    values = np.random.default_rng(2).choice([-1.0, -0.25, 0.0, 0.75], size=60)
    draws = np.random.default_rng(3).integers(60, size=(20_000, 60))
    expected = np.quantile(values[draws].mean(1), [0.05, 0.95])
    found = bootstrap_mean(values, samples=20_000, level=0.9)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_mean(values, seed=7) == bootstrap_mean(values, seed=7) != bootstrap_mean(values, seed=8)


def test_what_does_not_vary_has_no_width() -> None:
    found = bootstrap_mean(np.ones(10, dtype=bool))
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(("values", "options"), [([], {}), ([1.0], {"samples": 0}), ([1.0], {"level": 1.0})])
def test_what_has_no_interval_is_refused(values: list[float], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"give one value|must be"):
        bootstrap_mean(np.array(values), **options)  # type: ignore[arg-type]
