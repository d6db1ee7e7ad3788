"""`aptvit models`: list the models that can be adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from aptvit.cli.options import JsonOption
from aptvit.cli.output import ProgressBars, print_json, print_message

if TYPE_CHECKING:
    from aptvit.hosts.catalogue import ModelEntry


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.")] = "*",
    library: Annotated[
        Literal["timm", "transformers", "open_clip"] | None, typer.Option(help="Only models of this library.")
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Also list models that cannot be adapted, with the reasons.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the list as Markdown, for the docs.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the models of timm and open_clip, and the classes of transformers, that can be adapted.

    Example: `aptvit models "*dinov3*"`
    """
    from aptvit.hosts.catalogue import as_markdown, as_table

    calls = [(name, describe) for names_of, describe in _libraries(library) for name in names_of(pattern)]
    if not calls:
        of_library = f" of {library}" if library else ""
        raise ValueError(f"no Vision Transformer{of_library} matches {pattern!r}: try a part of a name, or '*'")
    with ProgressBars() as bars:
        entries = [describe(name) for name, describe in bars(calls, "building models", len(calls))]
    if as_json:
        fields = ("library", "name", "reason")
        print_json([{**{f: getattr(e, f) for f in fields}, "adaptable": e.reason is None, **e.traits} for e in entries])
    elif markdown:
        print(as_markdown(entries))
    else:
        for name in dict.fromkeys(entry.library for entry in entries):
            Console().print(as_table([entry for entry in entries if entry.library == name], show_all))


def _libraries(chosen: str | None) -> Iterator[tuple[Callable[[str], list[str]], Callable[[str], ModelEntry]]]:
    """For each library that is chosen and installed, what lists its names and what describes a model."""
    import importlib.util

    for name in (chosen,) if chosen else ("timm", "transformers", "open_clip"):
        if importlib.util.find_spec(name) is None:
            print_message(f"{name} is not installed: its models are not listed")
        elif name == "timm":
            from aptvit.hosts.catalogue import describe_model, model_names

            yield model_names, describe_model
        elif name == "transformers":
            from aptvit.hosts.catalogue_transformers import class_names_of_transformers, describe_class

            yield class_names_of_transformers, describe_class
        else:
            from aptvit.hosts.catalogue_open_clip import describe_open_clip, open_clip_names

            yield open_clip_names, describe_open_clip
