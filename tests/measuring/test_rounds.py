"""The order of rounds, and ratios of paired ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from aptvit.measuring import rounds
from aptvit.measuring.rounds import Paired, Ratio, interleaved, paired_rounds


def test_rounds_are_interleaved_and_the_order_alternates() -> None:
    calls: list[str] = []
    seconds = interleaved([partial(calls.append, name) for name in "abc"], 3, "cpu")
    assert "".join(calls) == "abccbaabc"
    assert [len(one) for one in seconds] == [3, 3, 3] and min(map(min, seconds)) >= 0


def test_rounds_of_warm_up_are_not_timed() -> None:
    calls: list[str] = []
    seconds = interleaved([partial(calls.append, name) for name in "ab"], 2, "cpu", warmup=1)
    assert "".join(calls) == "abbaab" and [len(one) for one in seconds] == [2, 2]


def test_each_batch_goes_through_all_sides_before_the_next_one() -> None:
    calls: list[str] = []
    sides = [lambda batch, name=name: calls.append(f"{name}{batch}") for name in "ab"]
    shown: list[tuple[str, int]] = []

    def progress(steps: Any, description: str, total: int) -> Any:
        shown.append((description, total))
        return steps

    seconds = paired_rounds(sides, [0, 1, 2], 2, "cpu", progress)
    # The first of the sides changes with each batch and each round.
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2", "b0", "a0", "a1", "b1", "b2", "a2"]
    assert [len(one) for one in seconds] == [2, 2] and shown == [("timing", 2)]


def test_seconds_of_a_round_are_those_of_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_seconds", lambda run, device: run())
    sides = [lambda batch: 1.0 * batch, lambda batch: 0.25 * batch]
    assert paired_rounds(sides, [1, 2, 3], 2, "cpu") == [[6.0, 6.0], [1.5, 1.5]]


def test_a_ratio_is_of_paired_rounds() -> None:
    ratio = Ratio.of_rounds([6.0, 2.0, 4.0], [2.0, 2.0, 1.0])
    assert ratio == Ratio(median=3.0, least=1.0, most=4.0)
    assert f"{ratio:.2f}" == "3.00 (1.00 to 4.00)"
    assert ratio.named("speedup") == {"speedup": 3.0, "speedup_least": 1.0, "speedup_most": 4.0}


@pytest.mark.parametrize(("above", "below"), [([1.0, 2.0], [1.0]), ([], []), ([1.0, 0.0], [1.0, 1.0]), ([1.0], [-1.0])])
def test_rounds_without_meaning_are_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        Ratio.of_rounds(above, below)


def test_numbers_of_two_sides_follow_from_their_rounds() -> None:
    pair = Paired(
        images=100,
        gflops_uniform=9.0,
        gflops_adaptive=3.6,
        seconds_uniform=(4.0, 6.0, 5.0),
        seconds_adaptive=(2.0, 2.0, 2.5),
    )
    assert (pair.throughput_uniform, pair.throughput_adaptive) == (20.0, 50.0)
    # The median of the ratios of pairs (2, 3, 2), not the ratio of the medians (2.5).
    assert pair.speedup == Ratio(2.0, 2.0, 3.0)
    assert pair.flop_ratio == pytest.approx(2.5) and pair.eta == pytest.approx(2.0 / 2.5)
