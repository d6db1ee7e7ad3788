"""Plots: the same file for the same numbers, each label once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aptvit.measuring.plots import draw_ratios, legend_below, make_panels, write_plots, write_results
from aptvit.measuring.record import Record
from aptvit.measuring.rounds import Ratio


def draw() -> object:
    figure, panels = make_panels(1, 2, (4, 2), "a title")
    for panel in panels.flat:
        draw_ratios(panel, [1, 2], [Ratio(2, 1, 3), Ratio(3, 2, 5)], label="ours")
    legend_below(figure, 1)
    return figure


def test_bars_reach_from_the_least_to_the_most() -> None:
    figure, ((panel,),) = make_panels(1, 1, (2, 2))
    draw_ratios(panel, [1, 2], [Ratio(2, 1, 3), Ratio(3, 2, 5)])
    (bars,) = panel.collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1, 3], [2, 5]]
    assert panel.lines[0].get_ydata().tolist() == [2, 3] and len(figure.axes) == 1


def test_the_same_numbers_are_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (written,) = write_plots({"-x": draw(), "-none": None}, tmp_path, name)  # type: ignore[dict-item]
        assert written == tmp_path / f"{name}-x.svg"
    text = (tmp_path / "one-x.svg").read_text()
    assert text == (tmp_path / "two-x.svg").read_text()
    assert text.count(">ours<") == 1 and "a title" in text  # text as text


def test_files_of_a_record_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record: Record = Record({"device": "cpu"})

    def figures(record: Record) -> dict:
        return {"": draw()}

    def page(record: Record, drawn: list[str]) -> str:
        return f"{record.environment} {drawn}"

    written = write_results(record, tmp_path, "a", page, figures)
    assert [path.name for path in written] == ["a.json", "a.md", "a.svg"] and "['a.svg']" in written[1].read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    written = write_results(record, tmp_path, "b", page, figures)
    assert [path.name for path in written] == ["b.json", "b.md"] and "[]" in written[1].read_text()
