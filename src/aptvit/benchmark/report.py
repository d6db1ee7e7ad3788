"""A table, a Markdown page and two plots of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Group

from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Case
from aptvit.measuring import plots
from aptvit.measuring.tables import Columns, listing, markdown_page, markdown_table, percent, section, terminal_page

__all__ = ["as_markdown", "as_table", "growth_groups", "write_plots"]

_ABOUT = """\
eta = speed-up / FLOP ratio: the share of the saved operations that became saved time. Both models run in one process,
batch by batch in alternating order, from normalised images in memory to logits, which includes scoring, layout and
embedding; the uniform model is timm's, with fused attention. Speed-ups are the median, the smallest and the largest of
the rounds. A multiplication and an addition are two operations. Weights are random, which changes no number here."""

_INFERENCE = "The paper's own tables give eta 0.54 (ViT-B/16 384) to 0.66 (ViT-H/14 336) for inference on an A100."
_NOTHING_MERGED = """\
Every patch is scored and none is merged: the overhead of adaptive patches where they save nothing. It is less than the
noise of the blocks, so the models are also timed without their blocks, and with merging disabled (`keep=1.0`), which
scores nothing. The paper's own table gives 5 to 11 % on an A100."""
_TRAINING = """\
A step is forward, cross-entropy, backward and AdamW. bfloat16 is autocast over float32 weights. Memory is the peak of a
step (activations and gradients), and in all with weights and optimizer state."""
_GROWTH = """\
Thresholds from one size reach the share at that size. Larger images are smoother per patch, so fewer stay small."""


def as_table(record: BenchmarkRecord) -> Group:
    """A table of the rows for the terminal, with the errors below."""
    ratios = [column for column in _TIMES if column[0] in ("FLOP ratio", "speed-up (rounds)", "eta")]
    columns = [("case", _named), ("kept", lambda row: percent(row.keep_mean)), *ratios]
    device, errors = record.environment.get("device", ""), "\n".join(map(_failed, record.failed))
    return terminal_page(device, markdown_table(columns, record.measured), errors, "red")


def as_markdown(record: BenchmarkRecord) -> str:
    """The record as a page: the machine, then tables of inference, of its overhead, of training and of growth."""
    growing = [row for rows in growth_groups(record).values() for row in rows]
    # A row with thresholds of its own size is in two tables.
    rows = [row for row in record.measured if row.case.thresholds_from is None or row not in growing]
    infer, train = ([row for row in rows if row.case.mode == mode] for mode in ("infer", "train"))
    merged = [row for row in infer if row.case.keep < 1]
    unmerged = [row for row in infer if row.case.keep == 1]
    return markdown_page(
        f"Speed on {record.environment.get('device', 'an unknown device')}",
        record.commands,
        record.environment,
        _ABOUT,
        section("Inference", _INFERENCE, [*_MODEL, *_TIMES, *_FRONT, *_MEMORY, *_RUN], merged),
        section("Nothing merged", _NOTHING_MERGED, [*_MODEL, *_COST, *_FRONT, *_RUN], unmerged),
        section("Training", _TRAINING, [*_MODEL, *_TIMES, *_MEMORY, *_RUN], train),
        section("Growth with resolution", _GROWTH, [*_GROWN, *_TIMES, *_RUN], growing),
        listing(map(_failed, record.failed), "Failed"),
    )


# Columns


def _side(row: BenchmarkRow) -> str:
    sides = row.image_size if row.error is None else (row.case.size or "its default",)
    return "x".join(map(str, dict.fromkeys(sides)))


def _named(row: BenchmarkRow, with_size: bool = True) -> str:
    case = row.case
    model = f"{case.model} at {_side(row)} px" if with_size else case.model
    return f"{model}, {case.dtype}, batch {case.batch}" + (", training" if case.mode == "train" else "")


def _failed(row: BenchmarkRow) -> str:
    return f"{_named(row)}, keep {row.case.keep:g}: {row.error}"


def _loss(row: BenchmarkRow) -> str:
    """Additional time in percent of the uniform model's: the inverse of the speed-up, with its ends swapped."""
    ratio = row.speedup
    middle, least, most = (100 * (1 / speedup - 1) for speedup in (ratio.median, ratio.most, ratio.least))
    return f"{middle:+.1f} % ({least:+.1f} to {most:+.1f})"


def _added(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.2f} %"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


_MODEL: Columns = (
    ("model", lambda row: f"`{row.case.model}`"),
    ("px", _side),
    ("type", lambda row: row.case.dtype),
    ("batch", lambda row: str(row.case.batch)),
)
_GROWN: Columns = (
    _MODEL[0],
    ("run", lambda row: row.case.mode),
    *_MODEL[1:],
    ("thresholds from", lambda row: f"{row.case.thresholds_from} px" if row.case.thresholds_from else "own size"),
)
_RUN: Columns = (
    ("ran as", lambda row: " / ".join(dict.fromkeys((row.backend_uniform, row.backend_adaptive)))),
    ("images", lambda row: f"{row.images}" + (f" of {row.photos} photos, repeated" if row.images > row.photos else "")),
    ("rounds", lambda row: str(len(row.seconds_uniform))),
)
_SPEED: Columns = (
    ("images/s uniform", lambda row: _digits(row.throughput_uniform)),
    ("adaptive", lambda row: _digits(row.throughput_adaptive)),
)
_TIMES: Columns = (
    ("asked", lambda row: f"{100 * row.case.keep:g} %"),
    ("kept (range)", lambda r: f"{percent(r.keep_mean)} ({100 * r.keep_least:.0f} to {100 * r.keep_most:.0f})"),
    ("GFLOPs/image uniform", lambda row: _digits(row.gflops_uniform)),
    ("adaptive", lambda row: _digits(row.gflops_adaptive)),
    ("FLOP ratio", lambda row: f"{row.flop_ratio:.2f}"),
    *_SPEED,
    ("speed-up (rounds)", lambda row: f"{row.speedup:.2f}"),
    ("eta", lambda row: f"{row.eta:.2f}"),
    ("eta, fastest rounds", lambda row: f"{row.eta_of_least:.2f}"),
)
_FRONT: Columns = (
    ("scoring + layout, ms/batch", lambda row: _optional(row.layout_ms)),
    ("embedding, ms/batch", lambda row: _optional(row.embed_ms)),
    ("both, of the forward", lambda row: None if row.front_share is None else percent(row.front_share)),
)
_COST: Columns = (
    *_SPEED,
    ("cost (rounds)", _loss),
    ("all but the blocks, ms/batch uniform", lambda row: _optional(row.outside_ms_uniform)),
    ("adaptive", lambda row: _optional(row.outside_ms_adaptive)),
    ("difference, of the uniform forward", lambda row: _added(row.added_share(row.outside_ms_adaptive))),
    ("merging disabled", lambda row: _optional(row.outside_ms_unscored)),
    ("difference", lambda row: _added(row.added_share(row.outside_ms_unscored))),
)
_MEMORY: Columns = (
    (
        "peak MB, uniform / adaptive",
        lambda row: row.memory and f"{row.memory.step_uniform / 1e6:,.0f} / {row.memory.step_adaptive / 1e6:,.0f}",
    ),
    ("ratio", lambda row: row.memory and f"{row.memory.step_ratio:.2f}"),
    ("ratio in all", lambda row: row.memory and f"{row.memory.total_ratio:.2f}"),
)


# Plots

_Value = Callable[[BenchmarkRow], float]


def growth_groups(record: BenchmarkRecord) -> dict[str, list[BenchmarkRow]]:
    """Rows that differ only in the size of the input, by a label, from small to large; groups of several sizes."""
    groups: dict[Case, list[BenchmarkRow]] = {}
    for row in sorted(record.measured, key=lambda row: row.image_size):
        if row.case.keep < 1:
            groups.setdefault(replace(row.case, size=None), []).append(row)
    return {
        f"{_named(rows[0], with_size=False)}, keep {case.keep:g}"
        + (f" at {case.thresholds_from} px" if case.thresholds_from else ""): rows
        for case, rows in groups.items()
        if len({row.image_size for row in rows}) > 1
    }


def write_plots(record: BenchmarkRecord, folder: Path, name: str) -> list[Path]:
    """Write NAME-eta.svg and, where a model has several sizes, NAME-growth.svg; returns their paths.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    return plots.write_plots({"-eta": _eta_figure(record), "-growth": _growth_figure(record)}, folder, name)


def _eta_figure(record: BenchmarkRecord) -> Any:
    """Speed-up and eta against the share of tokens, a line for each model, type and batch; None without rows."""
    lines: dict[str, list[BenchmarkRow]] = {}
    for row in sorted(record.measured, key=lambda row: row.keep_mean):
        if row.case.thresholds_from is None:
            lines.setdefault(_named(row), []).append(row)
    if not lines:
        return None
    title = "Time saved and operations saved"
    figure, _, below = _speedups(title, record, lines, lambda row: 100 * row.keep_mean, lambda row: row.eta)
    below.set(ylabel="eta = speed-up / FLOP ratio", xlabel="patch tokens kept, percent")
    below.axhline(1, color="black", linestyle="--", linewidth=0.8)
    below.invert_xaxis()  # more is saved towards the right
    low, high = below.get_ylim()
    below.set_ylim(min(low, 0.4), max(high, 1.1))  # does not enlarge noise of a percent
    return figure


def _growth_figure(record: BenchmarkRecord) -> Any:
    """Speed-up and FLOP ratio against resolution, for each model; None where no model has several sizes."""
    groups = growth_groups(record)
    if not groups:
        return None

    def side(row: BenchmarkRow) -> float:
        return math.prod(row.image_size) ** 0.5

    figure, above, below = _speedups("Growth with resolution", record, groups, side, lambda row: 100 * row.keep_mean)
    for rows, colour in zip(groups.values(), cycle(plots.COLOURS), strict=False):
        above.plot([*map(side, rows)], [row.flop_ratio for row in rows], ":x", color=colour, markersize=5)
    above.set_ylabel("speed-up (dotted: FLOP ratio)")
    below.set(ylabel="patch tokens kept, percent", xlabel="side of the image, pixels")
    below.set_ylim(bottom=0)
    return figure


def _speedups(
    title: str, record: BenchmarkRecord, lines: dict[str, list[BenchmarkRow]], x: _Value, y: _Value
) -> tuple[Any, Any, Any]:
    """Two panels: speed-ups against x, and y against x below."""
    title = f"{title}\n{record.environment.get('device', '')}"
    figure, ((above,), (below,)) = plots.make_panels(2, 1, (10, 7.5), title, sharex=True)
    for (label, rows), colour in zip(lines.items(), cycle(plots.COLOURS), strict=False):
        plots.draw_ratios(above, [*map(x, rows)], [row.speedup for row in rows], label=label, color=colour)
        below.plot([*map(x, rows)], [*map(y, rows)], marker="o", markersize=4, color=colour)
    above.set_ylabel("speed-up")
    above.axhline(1, color="black", linestyle="--", linewidth=0.8)
    plots.legend_below(figure, 2)
    return figure, above, below
