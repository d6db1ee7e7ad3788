"""Commands whose disk is full at a random moment: one line, and with more room the same results.

The disk is a small tmpfs where this process may mount one; elsewhere the error of a full disk is raised in its place.
"""

from __future__ import annotations

import contextlib
import errno
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import sandbox
from .fixtures import make_models
from .results import Outcome, Result
from .works import WORKS, Work, differences

__all__ = ["trial"]

SECONDS = 60.0  # after which a command hangs
ROOM = 200_000_000  # bytes, more than any work needs


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`. One work after the other, with less room than it needs, and then with enough."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="aptvit-trials-") as place:
        root = Path(place).resolve()
        sandbox.import_libraries(root)
        make_models(root / "models")
        expected: dict[str, tuple[dict[str, Any], int]] = {}
        number = 0
        while number < 1 or time.monotonic() < deadline:
            work = WORKS[number % len(WORKS)]
            if work.name not in expected:
                folder = sandbox.fresh(root / "work")
                work.data(folder / "data")
                ended = work.run(folder, root / "models", seconds=SECONDS)
                if ended.code:
                    yield Result(f"{work.name}: on a large disk", Outcome.CRASHED, ended.messages[-2000:])
                    return
                expected[work.name] = work.results(folder / "out"), _size(folder / "out")
            yield from _filled(work, root, *expected[work.name], rng, number)
            number += 1


def _filled(
    work: Work, root: Path, expected: dict[str, Any], size: int, rng: random.Random, number: int
) -> Iterator[Result]:
    folder = sandbox.fresh(root / "work")
    work.data(folder / "data")
    room = int(rng.uniform(0.02, 0.95) * size) // 4096 * 4096 + 4096
    name = f"{work.name} {number}, {room:,} of {size:,} bytes"
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
        different = differences(work.results(folder / "out"), expected)
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
        if _size(folder) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    writing.flush = limited
    sandbox.command_line()


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, or of a file, in whole pages."""
    files = [folder, *(folder.rglob("*") if folder.is_dir() else ())]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files if path.is_file())
