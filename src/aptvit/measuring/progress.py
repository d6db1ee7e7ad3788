"""The type of a progress bar, and a progress bar that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Progress", "silent"]

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""(steps, description, number of steps) -> the same steps; while they are iterated, a progress bar is drawn."""


def silent(steps: Iterable[Any], _description: str, _total: int) -> Iterable[Any]:
    """The steps, without a progress bar."""
    return steps
