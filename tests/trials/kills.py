"""Commands that are stopped at random moments by random signals, and continued: nothing is lost, nothing is another."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

from . import sandbox
from .results import Outcome, Result
from .works import SECONDS, Usual, Work, differences, try_works

__all__ = ["trial"]

MOST_STOPS = 4  # of one work
# Signals and the seconds between them: by the kernel or a scheduler, a service manager, a terminal, an impatient user.
SIGNALS: tuple[tuple[tuple[float, int], ...], ...] = (
    ((0, signal.SIGKILL),),
    ((0, signal.SIGTERM),),
    ((0, signal.SIGHUP),),
    ((0, signal.SIGINT),),
    ((0, signal.SIGTERM), (0.05, signal.SIGTERM)),
    ((0, signal.SIGINT), (1.1, signal.SIGINT)),
    ((0, signal.SIGTERM), (0.2, signal.SIGKILL)),
)
ALLOWED = (0, 1, 130, *(-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)))


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`. One work after the other, each stopped up to four times."""
    return try_works(deadline, seed, _stopped)


def _stopped(work: Work, root: Path, usual: Usual, rng: random.Random, number: int) -> Iterator[Result]:
    """Stop a work at random moments, then let it end; a result for each stop, and one for the end."""
    folder = root / "work"
    begun = False
    for stop in range(rng.randint(1, MOST_STOPS)):
        signals, moment = rng.choice(SIGNALS), rng.uniform(0.05, 1) * usual.seconds
        sent = [(moment + later, what) for later, what in signals]
        name = f"{work.name} {number}, stop {stop} by {'+'.join(signal.Signals(what).name for _, what in signals)}"
        ended = work.run(folder, root / "models", begun, seconds=SECONDS, signals=sent)
        begun = True
        outcome = _outcome(ended)
        yield Result(f"{name} after {moment:.2f} s", outcome, f"{ended.code}: {ended.messages[-1500:]}")
        if outcome is not Outcome.RIGHT:
            return
    ended = work.run(folder, root / "models", begun, seconds=SECONDS)
    if ended.code:
        yield Result(f"{work.name} {number}, continued", Outcome.LOST, f"{ended.code}: {ended.messages[-1500:]}")
        return
    different = differences(work.results(folder / "out"), usual.results)
    yield Result(f"{work.name} {number}, end", Outcome.WRONG if different else Outcome.RIGHT, different)


def _outcome(ended: sandbox.Ended) -> Outcome:
    if ended.code is None:
        return Outcome.HUNG
    if ended.code not in ALLOWED or "Traceback" in ended.messages:
        return Outcome.CRASHED
    return Outcome.RIGHT
