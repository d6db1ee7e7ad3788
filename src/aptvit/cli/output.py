"""What commands print, their exit codes, and their progress bars."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aptvit.measuring.progress import ProgressLines

FAILED = 1
"""Exit code of a command that ran, but could not read some inputs or finish some of the work."""

BAD_INPUT = 2
"""Exit code of a command that did not run, because of a wrong value, path or option, or a missing extra."""

INTERRUPTED = 130
"""Exit code of a command that was interrupted."""


class ProgressBars:
    """Progress bars on standard error, one for each loop; a line in half a minute if it is no terminal.

    An instance is a `aptvit.measuring.progress.Progress`.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True)
        self._lines = None if console.is_terminal else ProgressLines(print_message)

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, steps: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        steps = steps if self._lines is None else self._lines(steps, description, total)
        return self._progress.track(steps, total=total, description=description)

    def counter(self, description: str, total: int, done: int) -> Callable[[int], None]:
        """Add a progress bar.

        Args:
            description: Text in front of the bar.
            total: Number of steps.
            done: Number of steps that are done already.

        Returns:
            A function that advances the bar by a number of steps.
        """
        task = self._progress.add_task(description, total=total, completed=done)
        write = None if self._lines is None else self._lines.counter(description, total, done)

        def advance(number: int) -> None:
            nonlocal done
            done += number
            self._progress.advance(task, number)
            if write is not None:
                write(done)

        return advance


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["aptvit", *sys.argv[1:]])


def print_message(message: str, style: str | None = None) -> None:
    """Print a line to standard error."""
    Console(stderr=True).print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def print_problem(problem: str) -> None:
    """Print why an image or an object is left out to standard error."""
    print_message(f"left out: {problem}", "yellow")


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=2))


def print_line(text: str) -> None:
    """Print a line to standard output, without wrapping it at the width of the terminal."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def finish(skipped: Sequence[str] = ()) -> None:
    """Print the reasons why inputs were skipped; if there are any, end the command with exit code `FAILED`."""
    for message in skipped:
        print_message(f"skipped: {message}", "yellow")
    if skipped:
        raise typer.Exit(FAILED)
