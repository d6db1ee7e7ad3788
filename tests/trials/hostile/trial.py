"""The trial: every hostile file to every command that reads files of its kind, each in a process of its own."""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import sandbox
from ..fixtures import NUM_GOOD, make_models
from ..results import Outcome, Result
from .annotations import annotations
from .archives import archives
from .case import Case, Payload
from .clips import clips
from .commands import COMMANDS, Command, Place
from .images import images
from .models import models

__all__ = ["all_cases", "trial", "verdict"]

LEAST = 4  # tries that are made however late it is
QUICK = ("show", "embed of tables", "embed of a list")  # commands of which these are

_READ, _BAD, _REFUSED = 0, 1, 2  # exit codes that are allowed


def all_cases(seed: int) -> list[Case]:
    """All hostile files."""
    generators = (images, models, archives, annotations, clips)
    return [case for generator in generators for case in generator(seed)]


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`. `APTVIT_TRIALS_ONLY` names tries to repeat: those that the expression matches."""
    only = os.environ.get("APTVIT_TRIALS_ONLY", "")
    with tempfile.TemporaryDirectory(prefix="aptvit-trials-") as folder, sandbox.listening() as (url, visitors):
        root = Path(folder).resolve()
        sandbox.import_libraries(root)
        make_models(root / "models")
        tries = list(_tries(all_cases(seed)))
        random.Random(seed).shuffle(tries)
        first = [attempt for attempt in tries if attempt[0].name in QUICK][:LEAST]
        tries = [*first, *(attempt for attempt in tries if attempt not in first)]
        bench = _Bench(root, url, visitors)
        usual: dict[str, float] = {}  # seconds of each command on good files
        for number, (command, cases) in enumerate(tries):
            if time.monotonic() > deadline and number >= LEAST:
                return
            if not re.search(only, _name(command, cases)):
                continue
            if command.name not in usual:  # it must be right on good files, or the trial would show nothing
                result, usual[command.name] = bench.attempt(command, (), 60)
                yield result
            seconds = usual[command.name] + sandbox.MAX_SECONDS * len(cases)
            yield bench.attempt(command, cases, seconds)[0]


@dataclass(frozen=True)
class _Bench:
    """Where commands are tried.

    Attributes:
        root: Folder with the models.
        url: Of the server that nothing may connect to.
        visitors: Who connected to it.
    """

    root: Path
    url: str
    visitors: list[Any]

    def attempt(self, command: Command, cases: Sequence[Case], seconds: float) -> tuple[Result, float]:
        """Give hostile files to a command; the result, and how many seconds it took."""
        work, payload = sandbox.fresh(self.root / "work"), Payload(self.root / "canary", self.url)
        words = command.words(Place(work, self.root / "models", payload), cases)
        before = _listing(work)
        ended = sandbox.run(words, work, seconds)
        outcome, detail = verdict(ended, command, cases)
        if payload.canary.exists() or self.visitors:
            outcome, detail = Outcome.CODE_RUN, "it connected" if self.visitors else "the canary is there"
            payload.canary.unlink(missing_ok=True)
            self.visitors.clear()
        elif outcome is Outcome.RIGHT and _listing(work) != before:
            outcome, detail = Outcome.CODE_RUN, f"changed {sorted(_listing(work) ^ before)[:5]}"
        detail = f"{detail}\n    {ended.seconds:.1f} s, {ended.growth / 1e6:.0f} MB, {words}"
        return Result(_name(command, cases), outcome, detail), ended.seconds


def _name(command: Command, cases: Sequence[Case]) -> str:
    return f"{command.name}: {' + '.join(case.name for case in cases) or 'nothing hostile'}"


def _tries(cases: Sequence[Case]) -> Iterator[tuple[Command, Sequence[Case]]]:
    for kind, commands in COMMANDS.items():
        of_kind = [case for case in cases if case.kind == kind]
        for command in commands:
            for start in range(0, len(of_kind), command.together):
                yield command, of_kind[start : start + command.together]


def _listing(work: Path) -> set[tuple[str, int, int]]:
    """Names, sizes and times of the files outside of the folders that a command may write to."""
    places = [path for path in work.iterdir() if path.name not in ("out", "tmp", "home", "log")]
    files = [path for place in places for path in (place, *(place.rglob("*") if place.is_dir() else ()))]
    return {(ascii(str(path)), (stat := path.lstat()).st_size, stat.st_mtime_ns) for path in files}


def verdict(ended: sandbox.Ended, command: Command, cases: Sequence[Case]) -> tuple[Outcome, str]:
    """What came of a command that was given hostile files, and why."""
    said = ended.output + ended.messages
    end = "\n    ".join(ended.messages.splitlines()[-12:])
    if ended.forbidden:
        return Outcome.CODE_RUN, f"{ended.forbidden[:3]}"
    if ended.growth > sandbox.MAX_GROWTH:
        return Outcome.CRASHED, "more than 2 GB"
    if ended.code is None:
        return Outcome.HUNG, end
    if "Traceback" in said or ended.code not in (_READ, _BAD, _REFUSED):
        return Outcome.CRASHED, f"exit code {ended.code}: {end}"
    if ended.code == _REFUSED:
        lines = ended.messages[ended.messages.rfind("\naptvit: ") + 1 :].splitlines()
        if len(lines) != 1 or not lines[0].startswith("aptvit: "):
            return Outcome.CRASHED, f"no single line: {end}"
    if not cases:
        return (Outcome.RIGHT if ended.code == _READ else Outcome.CRASHED), f"exit code {ended.code}: {end}"
    silent = [case.name for case in cases if case.must_tell]
    counts_errors = command.name.startswith("embed") and ended.code == _BAD  # in the column of errors
    if silent and ended.code != _REFUSED and "hostile" not in said and not counts_errors:
        return Outcome.WRONG, f"exit code {ended.code}, nothing about {silent}: {said[-300:]}"
    if command.name == "embed" and re.search(rf"^{NUM_GOOD} images,", said, re.MULTILINE) and silent:
        return Outcome.LOST, said[-300:]
    if command.reports_all and ended.code != _REFUSED and command.name != "embed":
        missing = [i for i in range(NUM_GOOD) if f"good{i}.png" not in ended.output]
        if missing:
            return Outcome.LOST, f"good images {missing}: {said[-300:]}"
    return Outcome.RIGHT, ""
