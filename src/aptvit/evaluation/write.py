"""The files of an evaluation."""

from __future__ import annotations

from pathlib import Path

from aptvit.evaluation.plot import write_plot
from aptvit.evaluation.record import Record
from aptvit.evaluation.table import as_markdown

__all__ = ["write_results"]


def write_results(record: Record, folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME.md and, where matplotlib is installed, NAME.svg; returns their paths.

    Args:
        record: What was found.
        folder: Where to; made if it does not exist.
        name: Of the files, without ending.
    """
    record.save(folder / f"{name}.json")
    plot = folder / f"{name}.svg"
    try:
        if record.measured:
            write_plot(record, plot)
        drawn = bool(record.measured)
    except ImportError:
        drawn = False
    page = folder / f"{name}.md"
    page.write_text(as_markdown(record, plot.name if drawn else None), encoding="utf-8")
    return [folder / f"{name}.json", page, *([plot] if drawn else [])]
