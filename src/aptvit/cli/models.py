"""`aptvit models`: list the models that can be adapted."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from aptvit.cli.options import JsonOption
from aptvit.cli.output import ProgressBars, print_json


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.")] = "*",
    show_all: Annotated[
        bool, typer.Option("--all", help="Also list models that cannot be adapted, with the reasons.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as Markdown, for the docs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the timm models that can be adapted.

    Example: `aptvit models "*dinov3*"`
    """
    from aptvit.hosts.catalogue import as_markdown, as_table, describe_model, model_names

    names = model_names(pattern)
    if not names:
        raise ValueError(f"no Vision Transformer of timm's matches {pattern!r}: try a part of a name, or '*'")
    with ProgressBars() as bars:
        entries = [describe_model(name) for name in bars(names, "building models", len(names))]
    if as_json:
        print_json([{"name": e.name, "adaptable": e.reason is None, "reason": e.reason, **e.traits} for e in entries])
    elif markdown:
        print(as_markdown(entries))
    else:
        Console().print(as_table(entries, show_all))
