"""Tables and pages in Markdown, also drawn in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Columns", "listing", "markdown_page", "markdown_table", "percent", "section", "terminal_page"]

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


def terminal_page(title: str, markdown: str, notes: str, style: str = "") -> Group:
    """Draw Markdown in the terminal. Title and notes are printed literally.

    Args:
        title: Text above.
        markdown: The tables.
        notes: Text below.
        style: Style of the notes.
    """
    from rich.console import Group
    from rich.markdown import Markdown
    from rich.text import Text

    return Group(Text(title, "bold"), Markdown(markdown), Text(notes, style))


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
