"""The page of commands is the one that the commands give, and an option means one thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from aptvit import cli
from aptvit.cli.reference import as_markdown, list_options

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
COMMANDS = {info.callback.__name__.replace("_", "-") for info in cli.app.registered_commands if info.callback}


def test_the_committed_page_is_what_the_commands_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_markdown(cli.app), "make pictures writes it again"


def contradictions(app: typer.Typer) -> set[str]:
    """Names of options with two meanings, values or defaults, and of meanings with two names."""
    meanings: dict[str, set[tuple[str, str, str]]] = {}
    names: dict[str, set[str]] = {}
    for option in list_options(app):
        if not option.is_argument:
            meanings.setdefault(option.name, set()).add((option.help, option.value, option.default))
            names.setdefault(option.help, set()).add(option.name)
    twice = {name for name, found in meanings.items() if len(found) > 1}
    return twice | {name for found in names.values() if len(found) > 1 for name in found}


def test_an_option_has_one_name_one_meaning_and_one_default() -> None:
    assert contradictions(cli.app) == set()


def test_contradictions_are_found() -> None:
    app = typer.Typer()

    def one(
        size: Annotated[int, typer.Option(help="Pixels.")] = 1, a: Annotated[int, typer.Option(help="A.")] = 1
    ) -> None: ...

    def two(
        size: Annotated[int, typer.Option(help="Pixels.")] = 2, b: Annotated[int, typer.Option(help="A.")] = 1
    ) -> None: ...

    app.command()(one)
    app.command()(two)
    assert contradictions(app) == {"--size", "--a", "--b"}


def test_every_command_has_json() -> None:
    of = {command: {o.name for o in list_options(cli.app) if o.command == command} for command in COMMANDS}
    assert {command for command, names in of.items() if "--json" not in names} <= {"reference"}


def test_every_option_and_argument_is_explained() -> None:
    assert [(o.command, o.name) for o in list_options(cli.app) if not o.help.strip().endswith(".")] == []


def test_the_page_is_in_agreement_with_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are read from the functions; the help is typer's own."""
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
            assert printed == as_markdown(cli.app)
