"""Tables, page and plot show every row."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from aptvit.evaluation.methods import Method
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow
from aptvit.evaluation.report import as_markdown, as_tables, figures, write_results


def without_labels(record: EvaluationRecord) -> EvaluationRecord:
    rows = [EvaluationRow(**{**vars(row), "top1": None, "top5": None}) for row in record.rows]
    return EvaluationRecord(record.environment, record.commands, rows)


def test_the_page_has_a_line_for_each_row(record: EvaluationRecord) -> None:
    page = as_markdown(record, ["plot.svg"])
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(sections) == ["224 px", "Could not run"]
    rows, at_equal_time = sections["224 px"].split("###")
    assert rows.count("| apt-entropy |") == 3 and rows.count("| tome |") == 2 and rows.count("| uniform |") == 1
    assert "| apt-entropy | set 0.8 | 80.0 % | 1.60 | 0.950 (0.887 to 1.045) | 70.0 (" in rows
    assert "against tome" in at_equal_time and "no setting that fast" in at_equal_time and "+25.0 (" in at_equal_time
    assert "- evit at 60 % at 224 px: there is no class token" in sections["Could not run"]
    assert "aptvit evaluate photos" in page and "plot.svg" in page and "- device: cpu (2 threads)" in page
    for table in (rows, at_equal_time):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_without_labels_agreement_takes_their_place(record: EvaluationRecord) -> None:
    page = as_markdown(without_labels(record))
    assert (
        "| top-1 |" not in page
        and "| agreement |" in page
        and "Agreement of adaptive patches minus the baseline's" in page
    )


def test_the_terminal_has_all_of_it_too(record: EvaluationRecord) -> None:
    text = io.StringIO()
    Console(width=160, file=text).print(as_tables(record))
    for expected in ("vit_made_up", "224 px", "set 0.4", "against tome", "no setting that fast", "no class token"):
        assert expected in text.getvalue()


def test_the_plot_has_a_point_for_each_row(record: EvaluationRecord, tmp_path: Path) -> None:
    figure = figures(record)[""]
    for panel, of in zip(figure.axes, ("time", "tokens"), strict=True):
        points = {line.get_label(): line.get_xydata() for line in panel.lines}
        assert {name: len(xy) for name, xy in points.items()} == {"uniform": 1, "apt-entropy": 3, "tome": 2}
        expected = {(row.time.median if of == "time" else row.tokens) for row in record.measured}
        assert {float(x) for xy in points.values() for x, _ in xy} == expected
    *_, plot = write_results(record, tmp_path, "one")
    words = plot.read_text()
    for expected in (
        "apt-entropy",
        "tome",
        "uniform",
        "time relative to the uniform model",
        "top-1 accuracy",
        "10 photos",
    ):
        assert expected in words
    write_results(record, tmp_path, "two")
    assert plot.read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_sizes_have_panels_of_their_own(record: EvaluationRecord) -> None:
    record.rows += [EvaluationRow(**{**vars(row), "size": 384}) for row in record.measured]
    assert len(figures(record)[""].axes) == 4 and record.sizes == [224, 384]
    assert "## 384 px" in as_markdown(record)


def test_an_empty_record_is_a_page_and_no_plot(tmp_path: Path) -> None:
    failed = EvaluationRecord({}, rows=[EvaluationRow(224, Method("evit", 0.5), error="no")])
    assert [path.name for path in write_results(failed, tmp_path / "deep", "none")] == ["none.json", "none.md"]
    assert "evit at 50 %" in (tmp_path / "deep" / "none.md").read_text()
    assert figures(failed) == {}


def test_files_of_a_record(record: EvaluationRecord, tmp_path: Path) -> None:
    written = write_results(record, tmp_path, "map")
    assert [path.name for path in written] == ["map.json", "map.md", "map.svg"] and all(p.is_file() for p in written)
    assert "(map.svg)" in (tmp_path / "map.md").read_text()
