"""The type of a progress bar, one that shows nothing, and progress in lines for outputs that are no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["Progress", "ProgressLines", "silent"]

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""(steps, description, number of steps) -> the same steps; while they are iterated, a progress bar is drawn."""


def silent(steps: Iterable[Any], _description: str, _total: int) -> Iterable[Any]:
    """The steps, without a progress bar."""
    return steps


class ProgressLines:
    """Progress of a loop in lines of text, at most one in half a minute. It is a `Progress`.

    Args:
        write: Prints a line.
        seconds: Least seconds between two lines.
        clock: Returns seconds.
    """

    def __init__(
        self, write: Callable[[str], None], seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._seconds, self._clock = write, seconds, clock

    def __call__(self, steps: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        advance = self.counter(description, total)
        for number, step in enumerate(steps, 1):
            yield step
            advance(number)

    def counter(self, description: str, total: int, done: int = 0) -> Callable[..., None]:
        """Begin a loop.

        Args:
            description: Text in front of the numbers.
            total: Number of steps.
            done: Number of steps that are done already.

        Returns:
            A function of the number of finished steps and a text; it prints a line if the last is long enough ago.
        """
        start = last = self._clock()

        def advance(number: float, text: str = "") -> None:
            nonlocal last
            now = self._clock()
            if now - last < self._seconds or number <= done:
                return
            last = now
            minutes = (total - number) * (now - start) / (number - done) / 60
            line = f"{description}: {number:.6g} of {total}, about {max(minutes, 0):.0f} minutes left"
            self._write(f"{line}  {text}" if text else line)

        return advance
