"""What a person reads of an evaluation: tables for the terminal and a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aptvit.evaluation.bootstrap import Interval
from aptvit.evaluation.record import Comparison, Record, Row

__all__ = ["as_markdown", "as_tables"]

_MINUS = "\N{MINUS SIGN}"

_ABOUT = """\
Every method runs on the same photos with the same weights. **time** is measured from normalised images in memory to
logits, scoring included, beside the uniform model's in one process, batch by batch, and is given relative to it: the
median over rounds, with the smallest and the largest. The uniform row is the uniform model beside itself: its spread is
the noise. **tokens** enter a block, mean over blocks and photos, relative to the uniform model's. **agreement** is the
share of photos with the uniform model's answer. Intervals are 95 %, by bootstrap over the photos. In GFLOPs a multiply
and an add count as two. *downscale* is the same model on a smaller picture that was made straight from the photo, so
that its time has no resizing in it."""

_EQUAL_TIME = """\
Ours minus the rival's {metric} in percentage points, photo by photo at the measured time of our row, with its 95 %
interval; bold where the interval excludes 0. A rival is interpolated linearly between its two settings next to that
time, the uniform model being the end of every rival's curve. The intervals are over photos; times are taken as they
were measured."""

_Columns = Sequence[tuple[str, Callable[[Row], str]]]


def as_tables(record: Record) -> Group:
    """The rows for the terminal, and ours against the rivals at equal time."""
    shown: list[RenderableType] = []
    for size in record.sizes:
        shown.append(_table(f"{record.environment.get('model', '')} at {size} px", _columns(record), record, size))
        if record.comparisons(size):
            shown.append(_comparison_table(record, size))
    if record.failed:
        shown.append(Text("\n".join(_failed(row) for row in record.failed), style="red"))
    return Group(*shown)


def _table(title: str, columns: _Columns, record: Record, size: int) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for i, (name, _) in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in _rows(record, size):
        style = "bold" if row.method.is_ours else None
        table.add_row(*(cell(row) for _, cell in columns), style=style)
    return table


def _comparison_table(record: Record, size: int) -> Table:
    caption = Text(f"ours minus the rival's {_metric(record)}, in points (95 % interval)")
    table = Table(title=Text("at equal measured time"), caption=caption, title_justify="left", caption_justify="left")
    header, *lines = _comparison_cells(record, size)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for line in lines:
        table.add_row(*(Text(cell.strip("*"), style="bold" if cell.startswith("**") else "") for cell in line))
    return table


def as_markdown(record: Record, plot: str | None = None) -> str:
    """The whole record as a page.

    Args:
        record: What to show.
        plot: File name of the plot, if there is one.
    """
    parts = [
        f"# Accuracy against time: {record.environment.get('model', 'an unknown model')}",
        "```\n" + "\n".join(record.commands) + "\n```",
        "\n".join(f"- {label}: {value}" for label, value in record.environment.items()),
        _ABOUT,
    ]
    if plot is not None:
        parts.append(f"![accuracy against time and against tokens]({plot})")
    for size in record.sizes:
        cells = [[cell(row) for _, cell in _columns(record)] for row in _rows(record, size)]
        parts += [f"## {size} px", _markdown_table([[name for name, _ in _columns(record)], *cells])]
        if record.comparisons(size):
            about = _EQUAL_TIME.format(metric=_metric(record))
            lines = _markdown_table(_comparison_cells(record, size))
            parts += [f"### {size} px, ours against each rival at equal measured time", about, lines]
    if record.failed:
        parts += ["## Could not run", "\n".join(f"- {_failed(row)}" for row in record.failed)]
    if record.skipped:
        parts += ["## Left out", "\n".join(f"- {message}" for message in record.skipped)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    header, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([header, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *rows])


def _rows(record: Record, size: int) -> list[Row]:
    return [row for rows in record.curves(size).values() for row in rows]


def _failed(row: Row) -> str:
    return f"{row.method} at {row.size} px: {row.error}"


def _metric(record: Record) -> str:
    return "top-1" if record.has_labels else "agreement"


# Columns


def _columns(record: Record) -> _Columns:
    labelled: _Columns = (
        ("top-1", lambda row: _interval(row.share("top1"))),
        ("top-5", lambda row: _percent(row.share("top5"))),
    )
    return (
        ("method", lambda row: row.method.name),
        ("setting", lambda row: row.setting),
        ("tokens", lambda row: f"{100 * row.tokens:.1f} %"),
        ("GFLOPs", lambda row: f"{row.gflops:#.3g}"),
        ("time", _time),
        *(labelled if record.has_labels else ()),
        ("agreement", lambda row: _interval(row.share("agrees"))),
        ("cosine", lambda row: f"{row.cosine:.3f}"),
    )


def _time(row: Row) -> str:
    time = row.time
    return f"{time.median:.3f} ({time.least:.3f} to {time.most:.3f})"


def _interval(share: Interval | None) -> str:
    return "" if share is None else f"{100 * share.mean:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _percent(share: Interval | None) -> str:
    return "" if share is None else f"{100 * share.mean:.1f}"


def _comparison_cells(record: Record, size: int) -> list[list[str]]:
    """A header, then a line for each row of ours: its time, what it reaches, the difference to each rival."""
    found = record.comparisons(size)
    rivals = list(dict.fromkeys(one.rival for one in found))
    lines = [["ours", "time", _metric(record), *(f"against {rival}" for rival in rivals)]]
    kind = "top1" if record.has_labels else "agrees"
    for row in dict.fromkeys(one.row for one in found):
        cells = {one.rival: _difference(one) for one in found if one.row == row}
        reached = _percent(row.share(kind))
        lines.append([str(row.method), f"{row.time.median:.3f}", reached, *(cells[rival] for rival in rivals)])
    return lines


def _difference(one: Comparison) -> str:
    if one.difference is None:
        return one.reason
    middle, low, high = (_signed(100 * x) for x in (one.difference.mean, one.difference.low, one.difference.high))
    text = f"{middle} ({low} to {high})"
    return f"**{text}**" if one.difference.excludes_zero else text


def _signed(points: float) -> str:
    rounded = round(points, 1) + 0.0  # no minus before a zero
    return f"{rounded:+.1f}".replace("-", _MINUS)
