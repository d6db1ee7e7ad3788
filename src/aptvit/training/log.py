"""Log of a training: a file with lines of JSON, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from aptvit.measuring.progress import ProgressLines
from aptvit.storage.writing import write_text

__all__ = ["RunLog", "RunningMeans", "print_line", "read_log"]

FILE = "log.jsonl"


class RunLog:
    """Log of a training: a file in its folder, TensorBoard if installed, and a progress bar; lines without a terminal.

    Args:
        run: Folder of the training.
        num_updates: Total number of updates.
        update: Number of finished updates. Lines of later updates, of an interrupted training, are removed.
        quiet: Write and print nothing, for processes other than the first.
    """

    def __init__(self, run: Path, num_updates: int, update: int = 0, quiet: bool = False) -> None:
        self.quiet, self.num_updates = quiet, num_updates
        self.console = Console(stderr=True, quiet=quiet)
        self._board: Any = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        self._lines = None if self.console.is_terminal else ProgressLines(self.print)
        if quiet:
            return
        run.mkdir(parents=True, exist_ok=True)
        path = run / FILE
        # A finished training is evaluated again.
        repeated = ("eval", "interpolation") if update >= num_updates else ()
        kept = [line for line in read_log(run) if line["update"] < update + (line["what"] not in repeated)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._task = self._bar.add_task("training", total=num_updates, completed=update, text="")
        self._board = _tensorboard(run, update)
        if self._lines is not None:
            self._advance = self._lines.counter("updates", num_updates, update)

    def __enter__(self) -> RunLog:
        if not self.quiet:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.quiet:
            self._bar.stop()
            for file in (self._file, self._board):
                with suppress(OSError):  # on a full disk
                    if file is not None:
                        file.close()

    def write(self, update: int, kind: str, **values: Any) -> None:
        """Write a line.

        Args:
            update: Number of finished updates.
            kind: Kind of the line: "start", "note", "train", "eval", "interpolation" or "problem".
            values: Values by name.
        """
        if self.quiet:
            return
        try:
            self._file.write(json.dumps({"update": update, "what": kind, **values}) + "\n")
        except OSError as error:  # on a full disk the training continues
            self.console.print(f"the log cannot be written: {error.strerror}", style="yellow")
        for name, value in values.items():
            if self._board is not None and isinstance(value, (int, float)):
                try:
                    self._board.add_scalar(f"{kind}/{name}", value, update)
                except OSError:
                    self._board = None

    def tick(self, update: float) -> None:
        """Print a line about a number of updates, if this is no terminal and the last line is old enough."""
        if not self.quiet and self._lines is not None:
            self._advance(update)

    def track(self, steps: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        """Return the steps of a loop besides the updates; without a terminal, lines tell how far it is."""
        return steps if self.quiet or self._lines is None else self._lines(steps, description, total)

    def advance(self, update: int, text: str) -> None:
        """Set the progress bar to a number of updates, with a text next to it."""
        if self.quiet:
            return
        self._bar.update(self._task, completed=update, text=text)
        if self._lines is not None:
            self._advance(update, text)

    def print(self, message: str, style: str | None = None) -> None:
        """Print a line above the progress bar, on standard error."""
        print_line(message, style, self.console)


def print_line(message: str, style: str | None = None, console: Console | None = None) -> None:
    """Print a line as it is, on a console, by default on standard error."""
    console = console or Console(stderr=True)
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


class RunningMeans:
    """Means of values over updates, and images per second, since the object was created."""

    def __init__(self) -> None:
        self.values_of_updates: list[dict[str, Tensor]] = []
        self.images, self.start = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor], images: int) -> None:
        """Add the values of an update, () each, and its number of images."""
        self.values_of_updates.append(values)
        self.images += images

    def values(self) -> dict[str, float]:
        """Return the mean of each value, and ``images_per_second``."""
        names = self.values_of_updates[0]
        means = {n: float(torch.stack([values[n].cpu() for values in self.values_of_updates]).mean()) for n in names}
        return {**means, "images_per_second": self.images / (time.perf_counter() - self.start)}


def read_log(run: Path) -> list[dict[str, Any]]:
    """Read the lines of the log in the folder of a training; a line that a killed process cut off is left out."""
    lines = []
    if (run / FILE).is_file():
        for text in (run / FILE).read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


def _tensorboard(run: Path, update: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=update + 1 if update else None)
