"""What came of a try, and the table of all tries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Outcome", "Result", "as_table"]


class Outcome(StrEnum):
    """What came of a try. All but the first are faults."""

    RIGHT = "right"
    LOST = "lost"
    WRONG = "silently wrong"
    HUNG = "hung"
    CODE_RUN = "code run"  # or a file written outside of --out, or the network touched
    CRASHED = "crashed"  # a traceback, a signal, or more memory than is allowed


@dataclass(frozen=True)
class Result:
    """A try.

    Attributes:
        name: What was tried; a try of the same name and seed can be repeated.
        outcome: What came of it.
        detail: What is needed to find a fault: the message, or the end of what was printed.
    """

    name: str
    outcome: Outcome
    detail: str = ""


FAULTS = tuple(outcome for outcome in Outcome if outcome is not Outcome.RIGHT)


def as_table(counts: dict[str, Counter[Outcome]]) -> str:
    """The number of tries and of each fault, for each kind of trial, as Markdown."""
    rows: Iterable[list[str]] = [
        ["trial", "tries", *FAULTS],
        ["---", *["---:"] * (1 + len(FAULTS))],
        *([kind, str(sum(count.values())), *(str(count[fault]) for fault in FAULTS)] for kind, count in counts.items()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
