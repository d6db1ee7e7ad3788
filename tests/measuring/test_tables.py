"""Tables and pages from columns."""

from __future__ import annotations

import io

from rich.console import Console

from aptvit.measuring.tables import Columns, listing, markdown_page, markdown_table, percent, section, terminal_table

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
    table = terminal_table("[b]title[/b]", COLUMNS, ROWS, "[i]below[/i]", bold=lambda row: row["name"] == "b")
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    parts = {part.text.strip(): bool(part.style and part.style.bold) for part in console.render(table)}
    assert {"[b]title[/b]", "[i]below[/i]", "time"} <= set(parts)
    assert (parts["[red]a[/red]"], parts["1.0"], parts["yes"]) == (False, False, True)
    assert parts["b"] and parts["2.0"]


def test_a_page_leaves_out_what_is_empty() -> None:
    page = markdown_page(
        "Title", ["one", "two"], {"torch": "9"}, "About.", section("None", "text", COLUMNS, []), listing([], "Failed")
    )
    assert page == "# Title\n\n```\none\ntwo\n```\n\n- torch: 9\n\nAbout.\n"
    page = markdown_page("Title", [], {}, section("Some", "text", COLUMNS, ROWS, level=3), listing(["x"], "Failed"))
    assert "\n\n### Some\n\ntext\n\n| name |" in page and page.endswith("\n\n## Failed\n\n- x\n")


def test_a_share_in_percent() -> None:
    assert percent(2 / 3) == "66.7 %"
