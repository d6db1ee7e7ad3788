"""Commands whose disk is full at a random moment: one line, and with more room the same results.

The disk is a small tmpfs where this process may mount one; elsewhere the error of a full disk is raised in its place.
"""

from __future__ import annotations

import contextlib
import errno
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from . import sandbox
from .results import Outcome, Result
from .works import SECONDS, Usual, Work, differences, size_of, try_works

__all__ = ["trial"]

ROOM = 200_000_000  # bytes, more than any work needs


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`. One work after the other, with less room than it needs, and then with enough."""
    return try_works(deadline, seed, _filled)


def _filled(work: Work, root: Path, usual: Usual, rng: random.Random, number: int) -> Iterator[Result]:
    folder = root / "work"
    room = int(rng.uniform(0.02, 0.95) * usual.size) // 4096 * 4096 + 4096
    name = f"{work.name} {number}, {room:,} of {usual.size:,} bytes"
    with _disk(folder / "out", room) as (more_room, main):
        ended = work.run(folder, root / "models", seconds=SECONDS, main=main)
        said = ended.messages[ended.messages.rfind("\naptvit: ") + 1 :].splitlines()
        detail = f"{ended.code}: {ended.messages[-1500:]}"
        if ended.code is None:
            yield Result(name, Outcome.HUNG, detail)
            return
        if ended.code < 0 or "Traceback" in ended.messages or (ended.code and "disk" not in said[0]):
            yield Result(name, Outcome.CRASHED, detail)
            return
        yield Result(name, Outcome.RIGHT, detail)
        more_room()
        ended = work.run(folder, root / "models", again=True, seconds=SECONDS)
        if ended.code:
            yield Result(f"{name}, then more", Outcome.LOST, f"{ended.code}: {ended.messages[-1500:]}")
            return
        different = differences(work.results(folder / "out"), usual.results)
        yield Result(f"{name}, then more", Outcome.WRONG if different else Outcome.RIGHT, different)


@contextlib.contextmanager
def _disk(folder: Path, room: int) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """A folder on a disk of a number of bytes; what gives it more room, and what runs a command on it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(folder)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        yield lambda: None, lambda: _run_with_limit(folder, room)
        return
    try:
        more = ["mount", "-o", f"remount,size={ROOM}", str(folder)]
        yield lambda: subprocess.run(more, check=True), sandbox.command_line
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _run_with_limit(folder: Path, room: int) -> None:
    """The command line, with an error as of a full disk where files in a folder grow beyond a number of bytes."""
    from aptvit.storage import writing

    flush = writing.flush

    def limited(path: Path) -> None:
        if size_of(folder) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    writing.flush = limited
    sandbox.command_line()
