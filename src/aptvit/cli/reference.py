"""`aptvit reference`, which is hidden: the page of the docs that lists all commands and options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from aptvit.cli.options import AsJson, print_json

__all__ = ["Option", "as_markdown", "list_options", "reference"]


@dataclass(frozen=True)
class Option:
    """An option or argument of a command, as typer has it.

    Attributes:
        command: Name of the command.
        name: ``--keep``, or the placeholder of an argument.
        value: Placeholder, choices or type of its value; empty for a flag.
        help: What it means.
        default: As text; empty for none.
        is_argument: Whether it has no name on the command line.
    """

    command: str
    name: str
    value: str
    help: str
    default: str
    is_argument: bool


def reference(as_json: AsJson = False) -> None:
    """Print the reference of the command line as Markdown."""
    from aptvit.cli import app

    if as_json:
        print_json([vars(option) for option in list_options(app)])
    else:
        print(as_markdown(app), end="")


def list_options(app: typer.Typer) -> list[Option]:
    """All options and arguments of all commands that are not hidden, in the order in which they are declared."""
    return [option for name, function in _commands(app).items() for option in _options_of(name, function)]


def as_markdown(app: typer.Typer) -> str:
    """The page: exit codes, the options that commands share, then each command."""
    options, commands = list_options(app), _commands(app)
    used: dict[str, list[Option]] = {}
    for option in options:
        if not option.is_argument:
            used.setdefault(option.name, []).append(option)
    shared = {name: found for name, found in used.items() if len(found) > 1}
    lines = [
        "# Commands",
        "",
        "Made by `aptvit reference`. `aptvit COMMAND --help` says the same.",
        "",
        _EXIT_CODES,
        "",
        "## Shared options",
        "",
        "An option has one meaning and one default in all commands that have it.",
        "",
        "| option | meaning | default | commands |",
        "|---|---|---|---|",
    ]
    for name, (first, *_) in shared.items():
        names = "all" if len(shared[name]) == len(commands) else ", ".join(option.command for option in shared[name])
        lines.append(f"| {_code(name, first.value)} | {_cell(first.help)} | {_cell(first.default)} | {names} |")
    for name, function in commands.items():
        mine = [option for option in options if option.command == name]
        arguments = " ".join(option.name for option in mine if option.is_argument)
        lines += ["", f"## aptvit {name}", "", f"`aptvit {name} {f'{arguments} ' if arguments else ''}[OPTIONS]`", ""]
        lines += [_paragraphs(function.__doc__ or "")]
        own = [option for option in mine if option.name not in shared]
        if own:
            lines += ["", "| | meaning | default |", "|---|---|---|"]
            lines += [f"| {_code(o.name, o.value)} | {_cell(o.help)} | {_cell(o.default)} |" for o in own]
        others = [f"`{option.name}`" for option in mine if option.name in shared]
        lines += ["", f"Shared options: {', '.join(others)}."]
    return "\n".join(lines) + "\n"


_EXIT_CODES = """\
Results are on standard output, progress and problems on standard error. With `--json` standard output is one JSON
value and nothing else.

| exit code | meaning |
|---|---|
| 0 | done; a training, also if images could not be read, which it reports and leaves out |
| 1 | ran, but some inputs could not be read or some of the work failed: standard error says which |
| 2 | did not run: a wrong value, path or option, or an extra that is not installed; one line says what to do |
| 130 | interrupted by Ctrl-C, or a training by SIGTERM: the files that were finished are whole |"""


def _commands(app: typer.Typer) -> dict[str, Callable[..., None]]:
    """The function of each command."""
    functions = [info.callback for info in app.registered_commands if info.callback is not None and not info.hidden]
    return {function.__name__.replace("_", "-"): function for function in functions}


def _options_of(command: str, function: Callable[..., None]) -> Iterator[Option]:
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotated: Any = hints[name]
        kind, info = annotated.__origin__, annotated.__metadata__[0]
        is_argument, default = isinstance(info, ArgumentInfo), parameter.default
        if is_argument:
            shown = info.metavar or (name.upper() if default is inspect.Parameter.empty else f"[{name.upper()}]")
        else:  # typer takes the first declaration of an annotated option for its default
            declared = [word for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
            shown = declared[0] if declared else f"--{name.replace('_', '-')}"
        if default is True:
            shown = f"{shown}/--no-{shown.removeprefix('--')}"
        value = "" if is_argument or kind is bool else info.metavar or _placeholder(kind)
        text = "" if default is None or isinstance(default, bool) else str(default)
        if default is True or default is inspect.Parameter.empty:
            text = "yes" if default is True else "" if is_argument else "required"
        yield Option(command, shown, value, info.help or "", text, is_argument)


def _placeholder(kind: Any) -> str:
    """What stands for a value: its choices, or its type."""
    kinds = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not Literal else [kind]
    kind = kinds[0] if kinds else kind
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(kind, "PATH")


def _code(name: str, value: str) -> str:
    return f"`{name} {value}`".replace("|", "\\|") if value else f"`{name}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))
