"""The page of commands in the docs is up to date, and each option has the same meaning in all commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from aptvit import cli
from aptvit.cli.reference import list_options, reference_page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
COMMANDS = {info.callback.__name__.replace("_", "-") for info in cli.app.registered_commands if info.callback}


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(cli.app), "`make pictures` writes the page"


def contradictions(app: typer.Typer) -> set[str]:
    """Return options with two meanings, values or defaults, and options with the same meaning but different names.

    ``--format`` has one meaning, and the formats of each command.
    """
    meanings: dict[str, set[tuple[str, str, str]]] = {}
    names: dict[str, set[str]] = {}
    for option in list_options(app):
        if not option.is_argument:
            values = ("", "") if option.name == "--format" else (option.value, option.default)
            meanings.setdefault(option.name, set()).add((option.help, *values))
            names.setdefault(option.help, set()).add(option.name)
    ambiguous = {name for name, uses in meanings.items() if len(uses) > 1}
    return ambiguous | {name for synonyms in names.values() if len(synonyms) > 1 for name in synonyms}


def test_an_option_has_one_name_one_meaning_and_one_default() -> None:
    assert contradictions(cli.app) == set()


def test_contradictions_are_found() -> None:
    app = typer.Typer()

    def first(
        size: Annotated[int, typer.Option(help="Pixels.")] = 1, a: Annotated[int, typer.Option(help="A.")] = 1
    ) -> None: ...

    def second(
        size: Annotated[int, typer.Option(help="Pixels.")] = 2, b: Annotated[int, typer.Option(help="A.")] = 1
    ) -> None: ...

    app.command()(first)
    app.command()(second)
    assert contradictions(app) == {"--size", "--a", "--b"}


def test_every_command_has_json() -> None:
    options = {command: {o.name for o in list_options(cli.app) if o.command == command} for command in COMMANDS}
    assert {command for command, names in options.items() if "--json" not in names} <= {"reference"}


def test_every_option_and_argument_is_explained() -> None:
    assert [(o.command, o.name) for o in list_options(cli.app) if not o.help.strip().endswith(".")] == []


def test_the_page_has_the_options_of_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is made from the functions; the help is printed by typer."""
    monkeypatch.setenv("COLUMNS", "200")
    for command in sorted(COMMANDS - {"reference"}):
        monkeypatch.setattr(sys, "argv", ["aptvit", command, "--help"])
        with pytest.raises(SystemExit):
            cli.main()
        printed = capsys.readouterr().out
        for option in list_options(cli.app):
            if option.command == command and not option.is_argument:
                assert option.name.split("/")[0] in printed, (command, option.name)


def test_the_hidden_command_prints_the_page_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["aptvit", "reference", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code in (0, None)
        printed = capsys.readouterr().out
        if words:
            assert {row["command"] for row in json.loads(printed)} == COMMANDS - {"reference"}
        else:
            assert printed == reference_page(cli.app)
