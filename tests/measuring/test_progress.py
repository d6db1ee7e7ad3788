"""Progress in lines."""

from __future__ import annotations

from aptvit.measuring.progress import ProgressLines


def test_a_line_is_written_when_the_last_is_old_enough() -> None:
    now, lines = [0.0], list[str]()
    progress = ProgressLines(lines.append, seconds=30, clock=lambda: now[0])
    for _ in progress(range(10), "images", 10):
        now[0] += 12
    left = {3: 1, 6: 1, 9: 0}
    assert lines == [f"images: {done} of 10, about {minutes} minutes left" for done, minutes in left.items()]


def test_a_continued_loop_counts_only_its_own_steps() -> None:
    now, lines = [0.0], list[str]()
    advance = ProgressLines(lines.append, seconds=30, clock=lambda: now[0]).counter("updates", 100, 50)
    now[0] = 60
    advance(50)  # nothing done yet
    advance(60.5, "loss 1.0")
    assert lines == ["updates: 60.5 of 100, about 4 minutes left  loss 1.0"]
