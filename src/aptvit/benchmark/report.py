"""What a person sees of a benchmark: a table in the terminal, a Markdown page, two plots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from aptvit.benchmark.record import Record, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["as_markdown", "as_table", "eta_figure", "growth_figure", "growth_groups", "write_plots"]

_ABOUT = """\
eta = (time uniform / time adaptive) / (FLOPs uniform / FLOPs adaptive): the share of the saved operations that became
saved time, 1 is all of them. Both sides run in one process, one right after the other in each round, from normalised
images in memory to logits; scoring, layout and embedding are inside. The uniform side is timm's own model with fused
attention. Speed-ups are medians over rounds of the ratio within a round, with the smallest and the largest. A multiply
and an add count as two. Weights are random: patches are chosen from pixels, so they change no number here."""

_PAPER_ETA = "The paper's own tables give eta 0.54 (ViT-B/16 384) to 0.66 (ViT-H/14 336) for inference on an A100."
_PAPER_COST = "The paper's own table gives 5 to 11 % on an A100."

_Columns = Sequence[tuple[str, Callable[[Row], str]]]


def as_table(record: Record) -> Table:
    """The rows for the terminal."""
    failures = Text("\n".join(_failed(row) for row in record.failed), style="red")
    table = Table(title=Text(record.environment.get("device", "")), caption=failures)
    table.title_justify = table.caption_justify = "left"
    table.add_column("case")
    for name in ("kept", "FLOP ratio", "speed-up", "rounds", "eta"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in record.measured:
        ratio = row.speedup
        rounds = f"{ratio.least:.2f} to {ratio.most:.2f}"
        numbers = (_percent(row.keep_mean), f"{row.flop_ratio:.2f}", f"{ratio.median:.2f}", rounds, f"{row.eta:.2f}")
        table.add_row(_named(row), *numbers)
    return table


def _named(row: Row) -> str:
    model, *rest = _labels(row)
    return ", ".join((f"{model} at {_side(row)} px", *rest))


def as_markdown(record: Record) -> str:
    """The whole record as a page: what it ran on, then a table for each question."""
    growing = [row for rows in growth_groups(record).values() for row in rows]
    # What was found for a size of its own answers both questions.
    shown = [row for row in record.measured if row.case.thresholds_from is None or row not in growing]
    infer = [row for row in shown if row.case.mode == "infer"]
    train = [row for row in shown if row.case.mode == "train"]
    parts = [
        f"# Speed on {record.environment.get('device', 'an unknown device')}",
        "```\n" + "\n".join(record.commands) + "\n```",
        "\n".join(f"- {label}: {value}" for label, value in record.environment.items()),
        _ABOUT,
        *_section("Inference", _PAPER_ETA, _INFERENCE, [row for row in infer if row.case.keep < 1]),
        *_section(
            "Nothing merged",
            "Every patch is scored and none is merged: what adaptivity costs where it saves nothing. The blocks are "
            "then the same work, and most of the time, so on a restless machine their noise hides the cost: it is "
            "shown as the difference of both sides without their blocks too, timed alone; also of a model that is told "
            f"to merge nothing (`keep=1.0`, thresholds below zero), which does not score. {_PAPER_COST}",
            _NOTHING_MERGED,
            [row for row in infer if row.case.keep == 1],
        ),
        *_section(
            "Training",
            "One step: forward, cross-entropy, backward, AdamW; each side with weights and optimizer of its own. "
            "bfloat16 is autocast over float32 weights. Memory is what a step allocates at its peak beyond what was "
            "live when it began (activations and gradients); in all, weights and optimizer state are added.",
            _TRAINING,
            train,
        ),
        *_section(
            "Growth with resolution",
            "Where thresholds are from one size, the share of tokens asked for is met there, and they are kept for the "
            "others: bigger pictures are smoother per patch, so fewer of their patches stay small.",
            _GROWTH,
            growing,
        ),
        *_failures(record),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, text: str, columns: _Columns, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return [f"## {title}", text, "\n".join(lines)]


def _failures(record: Record) -> list[str]:
    if not record.failed:
        return []
    return ["## Failed", "\n".join(f"- {_failed(row)}" for row in record.failed)]


def _failed(row: Row) -> str:
    return f"{_named(row)}, keep {row.case.keep:g}: {row.error}"


# Columns


def _side(row: Row) -> str:
    if row.error is not None:
        return "its own" if row.case.size is None else str(row.case.size)
    height, width = row.image_size
    return str(height) if height == width else f"{height}x{width}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spread(row: Row) -> str:
    ratio = row.speedup
    return f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})"


def _kept(row: Row) -> str:
    return f"{_percent(row.keep_mean)} ({100 * row.keep_least:.0f} to {100 * row.keep_most:.0f})"


def _cost(row: Row) -> str:
    """Time lost, in percent of the uniform model's: the inverse of the speed-up, its ends swapped."""
    ratio = row.speedup
    middle, least, most = (100 * (1 / one - 1) for one in (ratio.median, ratio.most, ratio.least))
    return f"{middle:+.1f} % ({least:+.1f} to {most:+.1f})"


def _threshold_source(row: Row) -> str:
    return "own size" if row.case.thresholds_from is None else f"{row.case.thresholds_from} px"


def _images(row: Row) -> str:
    """How many images a round has, and of how many photos."""
    return str(row.images) if row.images <= row.photos else f"{row.images} of {row.photos} photos, repeated"


def _backends(row: Row) -> str:
    sides = (row.backend_uniform, row.backend_adaptive)
    return sides[0] if sides[0] == sides[1] else f"{sides[0]} / {sides[1]}"


def _megabytes(row: Row) -> str:
    if row.memory is None:
        return ""
    return f"{row.memory.step_uniform / 1e6:,.0f} / {row.memory.step_adaptive / 1e6:,.0f}"


def _front_share(row: Row) -> str:
    return "" if row.front_share is None else _percent(row.front_share)


def _added(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.2f} %"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


_MODEL: _Columns = (
    ("model", lambda row: f"`{row.case.model}`"),
    ("px", _side),
    ("type", lambda row: row.case.dtype),
    ("batch", lambda row: str(row.case.batch)),
)
_RUN: _Columns = (("ran as", _backends), ("images", _images), ("rounds", lambda row: str(row.rounds)))
_SPEED: _Columns = (
    ("images/s uniform", lambda row: _digits(row.throughput_uniform)),
    ("adaptive", lambda row: _digits(row.throughput_adaptive)),
)
_RATIOS: _Columns = (
    ("GFLOPs/image uniform", lambda row: _digits(row.gflops_uniform)),
    ("adaptive", lambda row: _digits(row.gflops_adaptive)),
    ("FLOP ratio", lambda row: f"{row.flop_ratio:.2f}"),
    *_SPEED,
    ("speed-up (rounds)", _spread),
    ("eta", lambda row: f"{row.eta:.2f}"),
    ("eta, fastest rounds", lambda row: f"{row.eta_of_least:.2f}"),
)
_FRONT: _Columns = (
    ("scoring + layout, ms/batch", lambda row: _optional(row.layout_ms)),
    ("embedding, ms/batch", lambda row: _optional(row.embed_ms)),
    ("both, of the forward", _front_share),
)
_ASKED: _Columns = (("asked", lambda row: f"{100 * row.case.keep:g} %"), ("kept (image by image)", _kept))
_OUTSIDE: _Columns = (
    ("all but the blocks, ms/batch uniform", lambda row: _optional(row.outside_ms_uniform)),
    ("adaptive", lambda row: _optional(row.outside_ms_adaptive)),
    ("difference, of the uniform forward", lambda row: _added(row.added_share)),
    ("told to merge nothing", lambda row: _optional(row.outside_ms_unscored)),
    ("difference", lambda row: _added(row.added_share_unscored)),
)
_MEMORY: _Columns = (
    ("peak MB, uniform / adaptive", _megabytes),
    ("ratio", lambda row: "" if row.memory is None else f"{row.memory.step_ratio:.2f}"),
    ("ratio in all", lambda row: "" if row.memory is None else f"{row.memory.total_ratio:.2f}"),
)
_INFERENCE: _Columns = (*_MODEL, *_ASKED, *_RATIOS, *_FRONT, *_MEMORY, *_RUN)
_NOTHING_MERGED: _Columns = (*_MODEL, *_SPEED, ("cost (rounds)", _cost), *_OUTSIDE, *_FRONT, *_RUN)
_TRAINING: _Columns = (*_MODEL, *_ASKED, *_RATIOS, *_MEMORY, *_RUN)
_GROWTH: _Columns = (
    *_MODEL[:1],
    ("run", lambda row: row.case.mode),
    *_MODEL[1:],
    (
        "thresholds from",
        lambda row: "own size" if row.case.thresholds_from is None else f"{row.case.thresholds_from} px",
    ),
    *_ASKED,
    *_RATIOS,
    *_RUN,
)


# Plots


def growth_groups(record: Record) -> dict[str, list[Row]]:
    """Rows of one model at several sizes that differ in nothing else, by a label, from small to large."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in record.measured:
        case = row.case
        if case.keep < 1:
            rest = (case.scales, case.compiled, case.graphs, case.thresholds_from, case.max_photos)
            groups.setdefault((*_labels(row), case.keep, rest), []).append(row)
    several = [rows for rows in groups.values() if len({row.image_size for row in rows}) > 1]
    return {
        f"{', '.join(_labels(rows[0]))}, keep {rows[0].case.keep:g}"
        + (f" at {rows[0].case.thresholds_from} px" if rows[0].case.thresholds_from else ""): sorted(
            rows, key=lambda row: row.image_size
        )
        for rows in several
    }


def _labels(row: Row) -> tuple[str, ...]:
    case = row.case
    return (case.model, case.dtype, f"batch {case.batch}", *(("training",) if case.mode == "train" else ()))


def eta_figure(record: Record) -> Figure | None:
    """Speed-up and eta against the share of tokens kept, a line for each model, type and batch; None without rows."""
    lines: dict[str, list[Row]] = {}
    for row in record.measured:
        if row.case.thresholds_from is None:
            lines.setdefault(_named(row), []).append(row)
    if not lines:
        return None
    figure, (above, below) = _two_panels("Time saved and operations saved", record)
    for label, rows in lines.items():
        rows = sorted(rows, key=lambda row: row.keep_mean)
        kept = [100 * row.keep_mean for row in rows]
        _draw_speedups(above, kept, rows, label)
        below.plot(kept, [row.eta for row in rows], marker="o", markersize=4)
    above.set_ylabel("speed-up")
    below.set_ylabel("eta = speed-up / FLOP ratio")
    below.set_xlabel("patch tokens kept, percent")
    below.invert_xaxis()  # more is saved towards the right
    low, high = below.get_ylim()
    below.set_ylim(min(low, 0.4), max(high, 1.1))  # so that noise of a percent does not look like a mountain range
    _finish(figure, above, below)
    return figure


def growth_figure(record: Record) -> Figure | None:
    """Speed-up and FLOP ratio against resolution, for each model; None where no model has several sizes."""
    groups = growth_groups(record)
    if not groups:
        return None
    figure, (above, below) = _two_panels("Growth with resolution", record)
    for label, rows in groups.items():
        sides = [(row.image_size[0] * row.image_size[1]) ** 0.5 for row in rows]
        _draw_speedups(above, sides, rows, label)
        colour = above.lines[-1].get_color()
        ratios = [row.flop_ratio for row in rows]
        above.plot(sides, ratios, color=colour, linestyle=":", marker="x", markersize=5, label=f"{label}: FLOP ratio")
        below.plot(sides, [100 * row.keep_mean for row in rows], color=colour, marker="o", markersize=4)
    above.set_ylabel("times (dotted: FLOP ratio)")
    below.set_ylabel("patch tokens kept, percent")
    below.set_xlabel("side of the picture, pixels")
    below.set_ylim(bottom=0)
    _finish(figure, above)
    return figure


def _two_panels(title: str, record: Record) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{title}\n{record.environment.get('device', '')}", fontsize=12)
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _draw_speedups(panel: Axes, x: Sequence[float], rows: Sequence[Row], label: str) -> None:
    """The medians as a line, the rounds as bars."""
    spreads = [row.speedup for row in rows]
    medians = [s.median for s in spreads]
    bars = [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]
    panel.errorbar(x, medians, yerr=bars, marker="o", markersize=4, capsize=2, elinewidth=0.8, label=label)


def _finish(figure: Figure, labelled: Axes, *others: Axes) -> None:
    for panel in (labelled, *others):
        panel.axhline(1, color="black", linestyle="--", linewidth=0.8)
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) > 3 else 1, fontsize=8)


def write_plots(record: Record, folder: Path, name: str) -> list[Path]:
    """Write NAME-eta.svg and, where a model has several sizes, NAME-growth.svg; returns their paths.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib

    figures: Iterable[tuple[str, Figure | None]] = (("eta", eta_figure(record)), ("growth", growth_figure(record)))
    written = []
    # Text as text, and nothing that differs from run to run: the files are committed.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aptvit"}):
        for kind, figure in figures:
            if figure is not None:
                written.append(folder / f"{name}-{kind}.svg")
                figure.savefig(written[-1], format="svg", metadata={"Date": None})
    return written
