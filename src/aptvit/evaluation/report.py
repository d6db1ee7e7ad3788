"""Tables, a Markdown page and a plot of an evaluation: accuracy against time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group

from aptvit.evaluation.methods import UNIFORM
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow
from aptvit.evaluation.statistics import Interval, bootstrap_mean
from aptvit.measuring import plots
from aptvit.measuring.tables import Columns, listing, markdown_page, markdown_table, percent, section, terminal_page

__all__ = ["as_markdown", "as_tables", "figures", "write_results"]

_ABOUT = """\
All methods run on the same images with the same weights. **time** is from normalised images in memory to logits,
scoring included, relative to the uniform model in the same process: the median, the smallest and the largest of the
rounds; the row of the uniform model shows the noise. **tokens** enter a block, mean over blocks and images, relative to
the uniform model. **agreement** is the share of images with the uniform model's top-1 class, **KL** the divergence from
its classes in nats. Intervals are 95 %, by bootstrap over the images. A multiplication and an addition are two
operations. *downscale* reads smaller images."""

_EQUAL_TIME = """\
{metric} of adaptive patches minus the baseline's in percentage points, at the measured time of the adaptive row, with
its 95 % interval over images; bold where it excludes 0. A baseline is interpolated linearly between its two nearest
settings; the uniform model is the end of every curve."""


def as_tables(record: EvaluationRecord) -> Group:
    """The tables of all sizes for the terminal, with the errors below."""
    model, errors = record.environment.get("model", ""), "\n".join(map(_failed, record.failed))
    return terminal_page(model, "\n\n".join(_sections(record)), errors, "red")


def as_markdown(record: EvaluationRecord, drawn: Sequence[str] = ()) -> str:
    """The record as a page.

    Args:
        record: The record.
        drawn: File names of plots.
    """
    images = [f"![accuracy against time and against tokens]({name})" for name in drawn]
    failed = listing(map(_failed, record.failed), "Could not run")
    title = f"Accuracy against time: {record.environment.get('model', 'an unknown model')}"
    parts = (_ABOUT, *images, *_sections(record), failed, listing(record.skipped, "Left out"))
    return markdown_page(title, record.commands, record.environment, *parts)


def write_results(record: EvaluationRecord, folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.svg; returns their paths."""
    return plots.write_results(record, folder, name, as_markdown, figures)


def _sections(record: EvaluationRecord) -> list[str]:
    """For each size, the table of its rows, and that of adaptive patches and baselines at equal time."""
    sections = []
    for size in record.sizes:
        sections.append(f"## {size} px\n\n" + markdown_table(_COLUMNS, _rows(record, size)))
        title = f"{size} px, adaptive patches against each baseline at equal measured time"
        about = _EQUAL_TIME.format(metric=_metric(record).capitalize())
        sections.append(section(title, about, *_at_equal_time(record, size), level=3))
    return sections


def _rows(record: EvaluationRecord, size: int) -> list[EvaluationRow]:
    return [row for rows in record.curves(size).values() for row in rows]


def _failed(row: EvaluationRow) -> str:
    return f"{row.method} at {row.size} px: {row.error}"


def _metric(record: EvaluationRecord) -> str:
    return "top-1" if record.has_labels else "agreement"


def _at_equal_time(record: EvaluationRecord, size: int) -> tuple[Columns, list[dict[str, str]]]:
    """Columns and rows: method, time and metric of each adaptive row, and its difference from each baseline."""
    kind = "top1" if record.has_labels else "agrees"
    rows = {str(row.method): row for row in _rows(record, size)}
    lines: dict[str, dict[str, str]] = {}
    for pair in record.at_equal_time(size):
        name, row = pair["ours"], rows[pair["ours"]]
        line = {"adaptive": name, "time": f"{row.time.median:.3f}", _metric(record): _mean(row, kind)}
        difference = _signed(pair["difference"]) if pair["difference"] else pair["reason"]
        lines.setdefault(name, line)[f"against {pair['rival']}"] = difference
    columns = next(iter(lines.values()), {})
    return [(name, itemgetter(name)) for name in columns], list(lines.values())


def _mean(row: EvaluationRow, kind: str) -> str:
    share = row.share(kind)
    return "" if share is None else f"{100 * share.mean:.1f}"


def _interval(share: Interval | None) -> str:
    return "" if share is None else f"{100 * share.mean:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _nats(divergence: Interval | None) -> str | None:
    if divergence is None:
        return None
    return f"{divergence.mean:.3f} ({divergence.low:.3f} to {divergence.high:.3f})"


def _signed(difference: Interval) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    points = [round(100 * value, 1) + 0.0 for value in (difference.mean, difference.low, difference.high)]
    text = "{:+.1f} ({:+.1f} to {:+.1f})".format(*points).replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


_COLUMNS: Columns = (
    ("method", lambda row: row.method.name),
    ("setting", lambda row: row.setting),
    ("tokens", lambda row: percent(row.tokens)),
    ("GFLOPs", lambda row: f"{row.gflops:#.3g}"),
    ("time", lambda row: f"{row.time:.3f}"),
    ("top-1", lambda row: _interval(row.share("top1"))),
    ("top-5", lambda row: _mean(row, "top5")),
    ("agreement", lambda row: _interval(row.share("agrees"))),
    ("KL", lambda row: _nats(row.divergence)),
    ("cosine", lambda row: f"{row.cosine:.3f}"),
)


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
    names = ", ".join(record.environment.get(label, "") for label in ("model", "device", "type"))
    intervals = [bootstrap_mean(row.point().scores) for row in record.measured]
    points = 50 * fmean(interval.high - interval.low for interval in intervals)
    count = f"{record.measured[0].photos} photos"
    return f"{names}\n{count}, the 95 % interval of a point is about \N{PLUS-MINUS SIGN}{points:.1f}"


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
