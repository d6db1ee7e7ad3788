"""Tables from columns: for the terminal, and as pages in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["Columns", "listing", "markdown_page", "markdown_table", "percent", "section", "terminal_table"]

Columns = Sequence[tuple[str, Callable[[Any], str | None]]]
"""Heading of each column, and its cell for a row; None leaves the cell empty."""


def percent(share: float) -> str:
    """A share with one decimal: "66.7 %"."""
    return f"{100 * share:.1f} %"


def markdown_table(columns: Columns, rows: Sequence[Any]) -> str:
    """A line for each row, the first column aligned left, all others right; columns that no row fills are left out."""
    filled = [[name, "---:", *(cell(row) or "" for row in rows)] for name, cell in columns]
    filled[0][1] = "---"
    lines = zip(*(column for column in filled if any(column[2:])), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal_table(
    title: str, columns: Columns, rows: Sequence[Any], caption: str | Text = "", bold: Any = None, **options: Any
) -> Table:
    """The same for the terminal. Text is shown as it is, without markup; cells between ``**`` are bold.

    Args:
        title: Above the table.
        columns: The columns.
        rows: What the cells are made of.
        caption: Below the table.
        bold: Function that says which rows are bold.
        options: More of `rich.table.Table`.
    """
    from rich.table import Table
    from rich.text import Text

    below = Text(caption) if isinstance(caption, str) else caption
    table = Table(title=Text(title), caption=below, title_justify="left", caption_justify="left", **options)
    for number, (name, _) in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        cells = (cell(row) or "" for _, cell in columns)
        texts = (Text(text.strip("*"), "bold" if text.startswith("**") else "") for text in cells)
        table.add_row(*texts, style="bold" if bold and bold(row) else None)
    return table


def markdown_page(title: str, commands: Sequence[str], environment: Mapping[str, str], *parts: str) -> str:
    """A page: what made it, on what, and the parts, of which empty ones are left out."""
    header = [
        f"# {title}",
        "```\n" + "\n".join(commands) + "\n```",
        listing(f"{k}: {v}" for k, v in environment.items()),
    ]
    return "\n\n".join(part for part in (*header, *parts) if part) + "\n"


def section(title: str, text: str, columns: Columns, rows: Sequence[Any], level: int = 2) -> str:
    """A heading, what the table shows, and the table; nothing without rows."""
    return "\n\n".join([f"{'#' * level} {title}", text, markdown_table(columns, rows)]) if rows else ""


def listing(lines: Any, title: str = "") -> str:
    """A bulleted list under a heading; nothing without lines."""
    items = "\n".join(f"- {line}" for line in lines)
    return f"## {title}\n\n{items}" if title and items else items
