"""The map as a picture: accuracy against time and against tokens, a line for each method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aptvit.evaluation.bootstrap import bootstrap_mean
from aptvit.evaluation.methods import UNIFORM
from aptvit.evaluation.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evaluation_figure", "write_plot"]

# Okabe and Ito's colours, which people with any colour vision tell apart; ours are the strong ones.
_OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#4B0082")
_RIVALS = ("#E69F00", "#56B4E9", "#7F7F7F", "#000000", "#8B4513", "#9ACD32", "#DC143C", "#808000")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")


def evaluation_figure(record: Record) -> Figure:
    """A line of panels for each size: against time, and against tokens.

    Raises:
        ValueError: If nothing was measured.
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if not record.sizes:
        raise ValueError("nothing was measured, so there is nothing to draw")
    figure = Figure(figsize=(10, 0.9 + 4.0 * len(record.sizes)), layout="constrained")
    panels = figure.subplots(len(record.sizes), 2, squeeze=False, sharey="row")
    styles = _styles(record)
    metric = "top-1 accuracy, %" if record.has_labels else "same answer as the uniform model, %"
    for size, (against_time, against_tokens) in zip(record.sizes, panels, strict=True):
        for name, rows in record.curves(size).items():
            points = [row.point() for row in rows]
            heights = [100 * point.scores.mean() for point in points]
            against_time.plot([point.time for point in points], heights, label=name, **styles[name])
            against_tokens.plot([row.tokens for row in rows], heights, label=name, **styles[name])
        against_time.set_ylabel(f"{size} px: {metric}")
        against_time.set_xlabel("time relative to the uniform model")
        against_tokens.set_xlabel("tokens relative to the uniform model")
        for panel in (against_time, against_tokens):
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    legend = {line.get_label(): line for panel in panels.flat for line in panel.lines}
    handles = [legend[name] for name in styles]
    figure.legend(handles, list(styles), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(_title(record), fontsize=11)
    return figure


def _title(record: Record) -> str:
    environment, rows = record.environment, record.measured
    told = ", ".join(environment.get(label, "") for label in ("model", "device", "type"))
    shares = [bootstrap_mean(row.point().scores) for row in rows if row.method != UNIFORM]
    if not shares:
        return told
    sure = sum(share.high - share.low for share in shares) / len(shares) / 2
    plus_minus = "\N{PLUS-MINUS SIGN}"
    return f"{told}\n{rows[0].photos} photos, the 95 % interval of a point is about {plus_minus}{100 * sure:.1f}"


def _styles(record: Record) -> dict[str, dict[str, Any]]:
    """Looks of each method, the same at all sizes."""
    names = list(dict.fromkeys(name for size in record.sizes for name in record.curves(size)))
    ours = {row.method.name for row in record.measured if row.method.is_ours}
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == UNIFORM.name:
            look: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 15, "linestyle": "none", "zorder": 4}
        elif name in ours:
            i = sum(other in ours for other in styles)
            dash = "-" if i < len(_OURS) else "-."
            look = {"color": _OURS[i % len(_OURS)], "marker": "o", "markersize": 6, "linewidth": 2.6, "zorder": 3}
            look["linestyle"] = dash
        else:
            i = sum(other not in ours and other != UNIFORM.name for other in styles)
            look = {"color": _RIVALS[i % len(_RIVALS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
            look |= {"linewidth": 1.3, "linestyle": "--", "zorder": 2}
        styles[name] = look
    return styles


def write_plot(record: Record, path: Path) -> None:
    """Write the picture, as SVG or whatever the file's ending says.

    Raises:
        ValueError: If nothing was measured.
        ImportError: If matplotlib is not installed.
    """
    import matplotlib

    # Text as text, and nothing that differs from run to run: the files are committed.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aptvit"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        evaluation_figure(record).savefig(path, metadata=metadata, dpi=120)
