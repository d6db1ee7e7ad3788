"""Tables and pages from columns."""

from __future__ import annotations

import io

from rich.console import Console
from rich.markdown import Markdown

from aptvit.measuring.tables import Columns, listing, markdown_page, markdown_table, percent, section

COLUMNS: Columns = (
    ("name", lambda row: row["name"]),
    ("time", lambda row: f"{row['time']:.1f}"),
    ("best", lambda row: "**yes**" if row["time"] < 2 else None),
)
ROWS = [{"name": "[red]a[/red]", "time": 1}, {"name": "b", "time": 2}]


def test_a_markdown_table_has_a_line_for_each_row() -> None:
    assert markdown_table(COLUMNS, ROWS).splitlines() == [
        "| name | time | best |",
        "| --- | ---: | ---: |",
        "| [red]a[/red] | 1.0 | **yes** |",
        "| b | 2.0 |  |",
    ]
    assert markdown_table(COLUMNS, ROWS[1:]).splitlines()[0] == "| name | time |"  # nothing is best


def test_the_terminal_shows_the_same_without_markup() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    segments = console.render(Markdown(markdown_table(COLUMNS, ROWS)))
    parts = {part.text.strip(): bool(part.style and part.style.bold) for part in segments}
    assert (parts["[red]a[/red]"], parts["1.0"], parts["yes"]) == (False, False, True)


def test_a_page_leaves_out_what_is_empty() -> None:
    page = markdown_page(
        "Title", ["one", "two"], {"torch": "9"}, "About.", section("None", "text", COLUMNS, []), listing([], "Failed")
    )
    assert page == "# Title\n\n```\none\ntwo\n```\n\n- torch: 9\n\nAbout.\n"
    page = markdown_page("Title", [], {}, section("Some", "text", COLUMNS, ROWS, level=3), listing(["x"], "Failed"))
    assert "\n\n### Some\n\ntext\n\n| name |" in page and page.endswith("\n\n## Failed\n\n- x\n")


def test_a_share_in_percent() -> None:
    assert percent(2 / 3) == "66.7 %"
