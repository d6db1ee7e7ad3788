"""What a training prints where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from aptvit.measuring.progress import ProgressLines
from aptvit.training.log import RunLog


def test_progress_is_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (30.0, lambda: seconds))
    with RunLog(tmp_path, num_updates=10, update=2) as log:
        for update in range(3, 11):
            seconds += 10
            log.advance(update, f"loss {update}")
        for number in log.track(range(4), "evaluation, batches", 4):
            seconds += 20 * (number < 3)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines == [
        "updates: 5 of 10, about 1 minutes left  loss 5",
        "updates: 8 of 10, about 0 minutes left  loss 8",
        "evaluation, batches: 2 of 4, about 1 minutes left",
    ]
    with RunLog(tmp_path / "other", num_updates=10, quiet=True) as log:  # another process than the first
        log.advance(5, "")
        seconds += 100
        log.advance(6, "")
    assert capsys.readouterr().err == ""
