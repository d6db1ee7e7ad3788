"""One process writes to a folder or a file; a second one is refused until the first has ended, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aptvit.storage.locking import lock, only_writer
from aptvit.storage.writing import WriteError

_HOLDER = """
import sys
from aptvit.storage.locking import lock
taken = lock(*sys.argv[1:])
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_writer(*place: str) -> Iterator[subprocess.Popen[str]]:
    """Context in which another process has a lock."""
    words = [sys.executable, "-c", _HOLDER, *place]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match=f"another process writes to {tmp_path}: wait until")
    with another_writer(str(tmp_path)), refused:
        lock(tmp_path)
    for _ in range(2):
        with lock(tmp_path):
            pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    with another_writer(str(tmp_path)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock(tmp_path):
            pass


def test_files_of_a_folder_are_locked_apart(tmp_path: Path) -> None:
    with another_writer(str(tmp_path), "a.json"):
        with only_writer(tmp_path / "b.json"), only_writer(None):
            pass
        with pytest.raises(ValueError, match=r"another process writes to .*a\.json"), only_writer(tmp_path / "a.json"):
            pass


def test_an_error_unlocks(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "new" / "a.json"):
            raise ZeroDivisionError


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*file/inside: Not a directory"):
        lock(tmp_path / "file" / "inside")
