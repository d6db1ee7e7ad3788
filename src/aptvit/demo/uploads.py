"""The folder of the demo page's uploads and results: a process has one, and nothing of it remains."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which does not delete files that a process holds open
    fcntl = None  # type: ignore[assignment]

__all__ = ["delete_old_files", "size_of_files", "upload_folder"]

_PREFIX = "aptvit-demo-"
_LOCK = "lock"


@contextmanager
def upload_folder() -> Iterator[Path]:
    """Make a folder that is deleted when the context ends.

    Folders of processes that were killed are deleted first. A process holds a lock on its folder for as long as it
    lives.

    Yields:
        The folder, readable for the user only.
    """
    temporary = Path(tempfile.gettempdir())
    for leftover in temporary.glob(f"{_PREFIX}*"):
        _delete_unlocked(leftover)
    # Locked before it has the name by which another process would look for it.
    folder = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    with (folder / _LOCK).open("w") as lock:
        _lock(lock)
        folder = folder.rename(folder.with_name(folder.name.removeprefix(".")))
        files = folder / "files"
        files.mkdir()
        try:
            yield files
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def delete_old_files(folder: Path, seconds: float) -> None:
    """Delete the files that came into a folder long ago.

    Args:
        folder: The folder; files at any depth in it.
        seconds: Age from which files are deleted.
    """
    before = time.time() - seconds
    for path in folder.rglob("*"):
        try:
            if not path.is_dir() and path.lstat().st_ctime < before:
                path.unlink()
        except OSError:  # deleted meanwhile
            continue


def size_of_files(folder: Path) -> int:
    """Return the bytes of all files in a folder.

    Args:
        folder: The folder; files at any depth in it.
    """
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # deleted meanwhile
                continue
    return total


def _lock(file: IO[str]) -> bool:
    """Lock an open file until it is closed; False if another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _delete_unlocked(folder: Path) -> None:
    """Delete a folder of this user that no process holds."""
    try:
        if folder.is_symlink() or (hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid()):
            return
        with (folder / _LOCK).open("r+") as lock:
            if _lock(lock):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # not a folder of ours, or deleted by another process
        return
