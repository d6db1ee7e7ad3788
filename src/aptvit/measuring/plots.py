"""Plots that are the same file for the same numbers, and the files of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aptvit.measuring.record import Record
from aptvit.measuring.rounds import Ratio
from aptvit.storage.writing import replacing, write_text

__all__ = ["COLOURS", "draw_ratios", "legend_below", "make_panels", "write_plots", "write_results"]

# The first four are Okabe and Ito's, which are distinct for any colour vision.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#4B0082", "#9ACD32"),
    *("#DC143C", "#808000", "#8B4513", "#7F7F7F", "#56B4E9", "#E69F00"),
)


def make_panels(rows: int, columns: int, size: tuple[float, float], title: str = "", **options: Any) -> Any:
    """Make a figure of panels with a light grid.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        size: Width and height in inches.
        title: Text above the panels.
        options: More options of ``Figure.subplots``.

    Returns:
        The figure, and the (rows, columns) array of its panels.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(title, fontsize=11)
    for panel in panels.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_ratios(panel: Any, x: Sequence[float], ratios: Sequence[Ratio], **options: Any) -> None:
    """Draw medians as a line, and the range of the rounds as bars."""
    medians = [ratio.median for ratio in ratios]
    bars = [[ratio.median - ratio.least for ratio in ratios], [ratio.most - ratio.median for ratio in ratios]]
    panel.errorbar(x, medians, yerr=bars, marker="o", markersize=4, capsize=2, elinewidth=0.8, **options)


def legend_below(figure: Any, columns: int, **options: Any) -> None:
    """Draw a legend for all panels, in which each label is once."""
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8, **options)


def write_plots(figures: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write each figure that is not None as SVG, named NAME and its key, and return the paths."""
    import matplotlib

    written = []
    # Text stays text, and no date or random identifier: the files are committed.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aptvit"}):
        for ending, figure in figures.items():
            if figure is not None:
                written.append(folder / f"{name}{ending}.svg")
                with replacing(written[-1]) as draft:
                    figure.savefig(draft, format="svg", metadata={"Date": None})
    return written


def write_results(
    record: Record[Any], folder: Path, name: str, as_markdown: Callable[..., str], figures: Callable[..., dict]
) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, plots; returns the paths.

    Args:
        record: The results.
        folder: The folder; created if it does not exist.
        name: Name of the files, without ending.
        as_markdown: (record, file names of the plots) -> the page.
        figures: (record) -> figures by the ending of their file name.
    """
    record.save(folder / f"{name}.json")
    try:
        plots = write_plots(figures(record), folder, name)
    except ImportError:
        plots = []
    page = folder / f"{name}.md"
    write_text(page, as_markdown(record, [plot.name for plot in plots]))
    return [folder / f"{name}.json", page, *plots]
