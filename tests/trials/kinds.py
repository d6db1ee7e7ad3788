"""The kinds of trials. A new kind is a module with a `trial`, and a line here."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

from .results import Result

__all__ = ["KINDS", "Trial", "send_results"]


class Trial(Protocol):
    """Tries things until the deadline or until everything was tried, whichever is first."""

    def __call__(self, deadline: float, seed: int) -> Iterator[Result]:
        """Yield the result of each try.

        Args:
            deadline: Value of `time.monotonic` after which nothing new is tried.
            seed: Seed of everything random.
        """


KINDS = {
    "kills": "tests.trials.kills",
    "threads": "tests.trials.threads",
    "disks": "tests.trials.disks",
    "hostile": "tests.trials.hostile.trial",
    "ray": "tests.trials.clusters",
    "embed": "tests.trials.load.embed",
    "calls": "tests.trials.load.calls",
    "page": "tests.trials.load.page",
}
"""Module of each kind; it is imported in a process of its own, in which nothing else runs."""


def send_results(kind: str, seconds: float, seed: int, results: Any) -> None:
    """Send the results of a kind, then None."""
    trial: Trial = importlib.import_module(KINDS[kind]).trial
    for result in trial(time.monotonic() + seconds, seed):
        results.send(result)
    results.send(None)
