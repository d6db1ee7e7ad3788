"""Tables from columns, for the terminal and for pages in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

__all__ = ["Columns", "listing", "markdown_page", "markdown_table", "percent", "section", "terminal_table"]

Columns = Sequence[tuple[str, Callable[[Any], str | None]]]
"""Heading of each column, and its cell for a row; None leaves the cell empty."""


def percent(share: float) -> str:
    """A share with one decimal: "66.7 %"."""
    return f"{100 * share:.1f} %"


def markdown_table(columns: Columns, rows: Sequence[Any]) -> str:
    """A table with the first column aligned left and the others right. Columns without any cell are left out."""
    filled = [[name, "---:", *(cell(row) or "" for row in rows)] for name, cell in columns]
    filled[0][1] = "---"
    lines = zip(*(column for column in filled if any(column[2:])), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(
    title: str, columns: Columns, rows: Sequence[Any], caption: str | Text = "", bold: Any = None, **options: Any
) -> Table:
    """A table for the terminal. Text is printed literally, without markup; cells between ``**`` are bold.

    Args:
        title: Text above the table.
        columns: The columns.
        rows: Values of the rows, the arguments of the columns' functions.
        caption: Text below the table.
        bold: Function of a row: whether the row is bold.
        options: More options of `rich.table.Table`.
    """
    caption = Text(caption) if isinstance(caption, str) else caption
    table = Table(title=Text(title), caption=caption, title_justify="left", caption_justify="left", **options)
    for number, (name, _) in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        cells = (cell(row) or "" for _, cell in columns)
        texts = (Text(text.strip("*"), "bold" if text.startswith("**") else "") for text in cells)
        table.add_row(*texts, style="bold" if bold and bold(row) else None)
    return table


def markdown_page(title: str, commands: Sequence[str], environment: Mapping[str, str], *parts: str) -> str:
    """A page: title, command lines, conditions by label, and the parts that are not empty."""
    conditions = listing(f"{label}: {value}" for label, value in environment.items())
    header = [f"# {title}", "```\n" + "\n".join(commands) + "\n```", conditions]
    return "\n\n".join(part for part in (*header, *parts) if part) + "\n"


def section(title: str, text: str, columns: Columns, rows: Sequence[Any], level: int = 2) -> str:
    """A heading, a text and a table; empty without rows."""
    return "\n\n".join([f"{'#' * level} {title}", text, markdown_table(columns, rows)]) if rows else ""


def listing(lines: Any, title: str = "") -> str:
    """A bulleted list, below a heading if there is a title; empty without lines."""
    items = "\n".join(f"- {line}" for line in lines)
    return f"## {title}\n\n{items}" if title and items else items
