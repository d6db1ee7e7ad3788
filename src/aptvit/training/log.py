"""The log of a training: lines of JSON, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

__all__ = ["Meter", "RunLog", "read_log"]

FILE = "log.jsonl"


class RunLog:
    """Log of a training in its folder.

    Args:
        run: The folder.
        num_updates: Updates in all.
        update: Updates done already: later lines, of an interrupted training, are removed.
        quiet: Write nothing and show nothing, as processes other than the first do.
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
        if quiet:
            return
        run.mkdir(parents=True, exist_ok=True)
        path = run / FILE
        kept = [line for line in read_log(run) if line["update"] <= update]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._task = self._bar.add_task("training", total=num_updates, completed=update, text="")
        self._board = _tensorboard(run, update)

    def __enter__(self) -> RunLog:
        if not self.quiet:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.quiet:
            self._bar.stop()
            self._file.close()
            if self._board is not None:
                self._board.close()

    def write(self, update: int, what: str, **values: Any) -> None:
        """A line: ``what`` it is about ("train", "eval", "problem", "start") and values by name."""
        if self.quiet:
            return
        try:
            self._file.write(json.dumps({"update": update, "what": what, **values}) + "\n")
        except OSError as error:  # a full disk is no reason to stop
            self.console.print(f"the log cannot be written: {error.strerror}", style="yellow")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{what}/{name}", value, update)

    def advance(self, update: int, text: str) -> None:
        """Move the bar."""
        if not self.quiet:
            self._bar.update(self._task, completed=update, text=text)

    def say(self, message: str, style: str | None = None) -> None:
        """A line for people."""
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


class Meter:
    """Means since the last line of the log."""

    def __init__(self) -> None:
        self.values_of_updates: list[dict[str, Tensor]] = []
        self.images, self.start = 0, time.perf_counter()

    def add(self, values: dict[str, Tensor], images: int) -> None:
        self.values_of_updates.append(values)
        self.images += images

    def values(self) -> dict[str, float]:
        names = self.values_of_updates[0]
        means = {n: float(torch.stack([values[n].cpu() for values in self.values_of_updates]).mean()) for n in names}
        return {**means, "images_per_second": self.images / (time.perf_counter() - self.start)}


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last line that was cut off when the process was killed."""
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
