"""Plots that change only with their numbers, and the files of a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aptvit.measuring.record import Record
from aptvit.measuring.rounds import Ratio

__all__ = ["COLOURS", "draw_ratios", "legend_below", "make_panels", "write_plots", "write_results"]

# Okabe and Ito's, which people with any colour vision tell apart.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#4B0082", "#9ACD32"),
    *("#DC143C", "#808000", "#8B4513", "#7F7F7F", "#56B4E9", "#E69F00"),
)


def make_panels(rows: int, columns: int, size: tuple[float, float], title: str = "", **options: Any) -> Any:
    """A figure and the array of its panels (rows, columns), with a light grid.

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
    """Medians as a line, the rounds as bars."""
    medians = [ratio.median for ratio in ratios]
    bars = [[ratio.median - ratio.least for ratio in ratios], [ratio.most - ratio.median for ratio in ratios]]
    panel.errorbar(x, medians, yerr=bars, marker="o", markersize=4, capsize=2, elinewidth=0.8, **options)


def legend_below(figure: Any, columns: int, **options: Any) -> None:
    """One legend for all panels: each label once."""
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8, **options)


def write_plots(figures: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME and the ending of each figure, as SVG; returns the paths. None is left out."""
    import matplotlib

    written = []
    # Text as text, and nothing that differs from run to run: the files are committed.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aptvit"}):
        for ending, figure in figures.items():
            if figure is not None:
                written.append(folder / f"{name}{ending}.svg")
                figure.savefig(written[-1], format="svg", metadata={"Date": None})
    return written


def write_results(
    record: Record[Any], folder: Path, name: str, as_markdown: Callable[..., str], figures: Callable[..., dict]
) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, plots; returns the paths.

    Args:
        record: The results.
        folder: Made if it does not exist.
        name: Of the files, without ending.
        as_markdown: Makes the page from the record and the file names of the plots.
        figures: Figures of the record by the ending of their name.
    """
    record.save(folder / f"{name}.json")
    try:
        plots = write_plots(figures(record), folder, name)
    except ImportError:
        plots = []
    page = folder / f"{name}.md"
    page.write_text(as_markdown(record, [plot.name for plot in plots]), encoding="utf-8")
    return [folder / f"{name}.json", page, *plots]
