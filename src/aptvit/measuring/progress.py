"""How long work is shown to the user: the type of a progress bar, and one that shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Progress", "silent"]

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Takes steps, a description and the number of steps; gives the same steps and shows how many are done."""


def silent(steps: Iterable[Any], _description: str, _total: int) -> Iterable[Any]:
    """The steps, with nothing shown."""
    return steps
