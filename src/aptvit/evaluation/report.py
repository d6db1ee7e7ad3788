"""Tables, a Markdown page and a plot of an evaluation: accuracy against time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from aptvit.evaluation.methods import UNIFORM
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow
from aptvit.evaluation.statistics import Interval, bootstrap_mean
from aptvit.measuring import plots
from aptvit.measuring.tables import Columns, listing, markdown_page, markdown_table, percent, section, terminal_table

__all__ = ["as_markdown", "as_tables", "figures", "write_results"]

_ABOUT = """\
Every method runs on the same photos with the same weights. **time** is from normalised images in memory to logits,
scoring included, relative to the uniform model's in the same process: the median over rounds, with the smallest and the
largest; the uniform row beside itself shows the noise. **tokens** enter a block, mean over blocks and photos, relative
to the uniform model's. **agreement** is the share of photos with the uniform model's answer. Intervals are 95 %, by
bootstrap over the photos. A multiply and an add count as two. *downscale* reads smaller images, resized beforehand."""

_EQUAL_TIME = """\
{metric} of adaptive patches minus that of the baseline in percentage points, photo by photo at the measured time of the
adaptive row, with its 95 % interval over photos; bold where it excludes 0. A baseline is interpolated linearly between
the two settings next to that time, the uniform model being the end of every curve."""


def as_tables(record: EvaluationRecord) -> Group:
    """Tables of each size: the rows, and adaptive patches and baselines at equal time; and below them the errors."""
    tables: list[RenderableType] = []
    for size in record.sizes:
        title = f"{record.environment.get('model', '')} at {size} px"
        tables.append(terminal_table(title, _columns(record), _rows(record, size), bold=lambda r: r.method.is_adaptive))
        columns, rows = _at_equal_time(record, size)
        if rows:
            caption = f"{_metric(record)} of adaptive patches minus the baseline's, in points (95 % interval)"
            tables.append(terminal_table("at equal measured time", columns, rows, caption))
    return Group(*tables, Text("\n".join(map(_failed, record.failed)), style="red"))


def as_markdown(record: EvaluationRecord, drawn: Sequence[str] = ()) -> str:
    """The record as a page.

    Args:
        record: The record.
        drawn: File names of plots.
    """
    parts = [_ABOUT, *(f"![accuracy against time and against tokens]({name})" for name in drawn)]
    for size in record.sizes:
        parts.append(f"## {size} px\n\n" + markdown_table(_columns(record), _rows(record, size)))
        title = f"{size} px, adaptive patches against each baseline at equal measured time"
        about = _EQUAL_TIME.format(metric=_metric(record).capitalize())
        parts.append(section(title, about, *_at_equal_time(record, size), level=3))
    parts += [listing(map(_failed, record.failed), "Could not run"), listing(record.skipped, "Left out")]
    title = f"Accuracy against time: {record.environment.get('model', 'an unknown model')}"
    return markdown_page(title, record.commands, record.environment, *parts)


def write_results(record: EvaluationRecord, folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.svg; returns their paths."""
    return plots.write_results(record, folder, name, as_markdown, figures)


# Columns


def _rows(record: EvaluationRecord, size: int) -> list[EvaluationRow]:
    return [row for rows in record.curves(size).values() for row in rows]


def _failed(row: EvaluationRow) -> str:
    return f"{row.method} at {row.size} px: {row.error}"


def _metric(record: EvaluationRecord) -> str:
    return "top-1" if record.has_labels else "agreement"


def _columns(record: EvaluationRecord) -> Columns:
    labelled: Columns = (("top-1", lambda row: _interval(row.share("top1"))), ("top-5", lambda row: _mean(row, "top5")))
    return (
        ("method", lambda row: row.method.name),
        ("setting", lambda row: row.setting),
        ("tokens", lambda row: percent(row.tokens)),
        ("GFLOPs", lambda row: f"{row.gflops:#.3g}"),
        ("time", lambda row: f"{row.time:.3f}"),
        *(labelled if record.has_labels else ()),
        ("agreement", lambda row: _interval(row.share("agrees"))),
        ("cosine", lambda row: f"{row.cosine:.3f}"),
    )


def _at_equal_time(record: EvaluationRecord, size: int) -> tuple[Columns, list[dict[str, str]]]:
    """Columns and rows: method, time and metric of each adaptive row, and its difference from each baseline."""
    kind = "top1" if record.has_labels else "agrees"
    lines: dict[str, dict[str, str]] = {}
    for pair in record.at_equal_time(size):
        name, row = str(pair.row.method), pair.row
        line = {"adaptive": name, "time": f"{row.time.median:.3f}", _metric(record): _mean(row, kind)}
        difference = pair.reason if pair.difference is None else _signed(pair.difference)
        lines.setdefault(name, line)[f"against {pair.baseline}"] = difference
    columns = next(iter(lines.values()), {})
    return [(name, itemgetter(name)) for name in columns], list(lines.values())


def _mean(row: EvaluationRow, kind: str) -> str:
    share = row.share(kind)
    return "" if share is None else f"{100 * share.mean:.1f}"


def _interval(share: Interval | None) -> str:
    return "" if share is None else f"{100 * share.mean:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _signed(difference: Interval) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    points = [round(100 * value, 1) + 0.0 for value in (difference.mean, difference.low, difference.high)]
    text = "{:+.1f} ({:+.1f} to {:+.1f})".format(*points).replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if difference.excludes_zero else text


# The plot


def figures(record: EvaluationRecord) -> dict[str, Any]:
    """The plot by the ending of its file name: a row of panels for each size; nothing without measured rows.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if not record.measured:
        return {}
    size = (10, 0.9 + 4.0 * len(record.sizes))
    figure, panels = plots.make_panels(len(record.sizes), 2, size, _title(record), sharey="row")
    styles = _styles(record)
    metric = "top-1 accuracy, %" if record.has_labels else "same answer as the uniform model, %"
    for side, (against_time, against_tokens) in zip(record.sizes, panels, strict=True):
        for name, rows in record.curves(side).items():
            points = [row.point() for row in rows]
            heights = [100 * point.scores.mean() for point in points]
            against_time.plot([point.time for point in points], heights, label=name, **styles[name])
            against_tokens.plot([row.tokens for row in rows], heights, label=name, **styles[name])
        against_time.set(ylabel=f"{side} px: {metric}", xlabel="time relative to the uniform model")
        against_tokens.set_xlabel("tokens relative to the uniform model")
    plots.legend_below(figure, 5, frameon=False)
    return {"": figure}


def _title(record: EvaluationRecord) -> str:
    title = ", ".join(record.environment.get(label, "") for label in ("model", "device", "type"))
    shares = [bootstrap_mean(row.point().scores) for row in record.measured if row.method != UNIFORM]
    if not shares:
        return title
    half = sum(share.high - share.low for share in shares) / len(shares) / 2
    sign = "\N{PLUS-MINUS SIGN}"
    return f"{title}\n{record.measured[0].photos} photos, the 95 % interval of a point is about {sign}{100 * half:.1f}"


def _styles(record: EvaluationRecord) -> dict[str, dict[str, Any]]:
    """Line style of each method, the same at all sizes; adaptive methods have thick lines."""
    adaptive, baselines, markers = cycle(plots.COLOURS), cycle(plots.COLOURS[::-1]), cycle("s^DvPX<>")
    styles: dict[str, dict[str, Any]] = {}
    methods = {row.method.name: row.method for size in record.sizes for row in _rows(record, size)}
    for name, method in methods.items():
        if method == UNIFORM:
            styles[name] = {"color": "black", "marker": "*", "markersize": 15, "linestyle": "none", "zorder": 4}
        elif method.is_adaptive:
            styles[name] = {"color": next(adaptive), "marker": "o", "markersize": 6, "linewidth": 2.6, "zorder": 3}
        else:
            styles[name] = {"color": next(baselines), "marker": next(markers), "linestyle": "--", "linewidth": 1.3}
    return styles
