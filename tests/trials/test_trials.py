"""The trials in short, and that they notice what they look for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import sandbox
from .hostile.case import Case
from .hostile.commands import COMMANDS, Command
from .hostile.trial import all_cases, verdict
from .results import Outcome

ROOT = Path(__file__).parents[2]


def test_the_trials_in_short() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.trials", "--minutes", "0.2", "--only", "hostile"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| hostile"))
    tries, *faults = row.strip("| ").split(" | ")[1:]
    assert int(tries) >= 4 and set(faults) == {"0"}


def test_there_are_enough_hostile_files_of_every_kind() -> None:
    cases = all_cases(0)
    assert len({case.name for case in cases}) == len(cases) >= 300
    assert {case.kind for case in cases} == COMMANDS.keys()
    assert [case.name for case in all_cases(0)] == [case.name for case in cases]


def connect() -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", 9))


def fill() -> None:
    bytearray(b"x" * (sandbox.MAX_GROWTH + 100_000_000))


def print_lines() -> None:
    print("aptvit: one\ntwo", file=sys.stderr)
    raise SystemExit(2)


def refuse() -> None:
    print("aptvit: hostile.png is hostile", file=sys.stderr)
    raise SystemExit(2)


def lose_an_image() -> None:
    print("good0.png\ngood1.png\nskipped: hostile.png")
    raise SystemExit(1)


ENDS: dict[str, tuple[Callable[[], Any], Outcome]] = {
    "refused": (refuse, Outcome.RIGHT),
    "traceback": (lambda: 1 / 0, Outcome.CRASHED),
    "signal": (lambda: os.kill(os.getpid(), 9), Outcome.CRASHED),
    "lines": (print_lines, Outcome.CRASHED),
    "memory": (fill, Outcome.CRASHED),
    "hang": (lambda: time.sleep(60), Outcome.HUNG),
    "file": (lambda: Path("outside").touch(), Outcome.CODE_RUN),
    "folder": (lambda: os.mkdir("outside"), Outcome.CODE_RUN),
    "rename": (lambda: os.rename("out/a", "a"), Outcome.CODE_RUN),
    "network": (connect, Outcome.CODE_RUN),
    "name": (lambda: socket.getaddrinfo("example.org", 80), Outcome.CODE_RUN),
    "process": (lambda: os.system("true"), Outcome.CODE_RUN),
    "silent": (lambda: print("good0.png good1.png good2.png"), Outcome.WRONG),
    "lost": (lose_an_image, Outcome.LOST),
    "inside": (lambda: (Path("out/b").touch(), refuse()), Outcome.RIGHT),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_fault_is_noticed(name: str, tmp_path: Path) -> None:
    main, outcome = ENDS[name]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    case = Case("hostile", "image", "hostile.png", lambda path, payload: None)
    ended = sandbox.run([], tmp_path, 1.0 if name == "hang" else 20.0, main)
    result, detail = verdict(ended, Command("show", lambda place, cases: [], reports_all=True), [case])
    assert result is outcome, detail
