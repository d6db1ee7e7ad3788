"""One writer at a time: a second process that would write to the same place is refused."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from aptvit.storage.writing import WriteError

__all__ = ["lock", "only_writer"]


def lock(folder: Path | str, file: str = "") -> AbstractContextManager[Any]:
    """Lock a folder, or a file in it, for this process; the operating system unlocks it when the process ends.

    Args:
        folder: The folder, which is made if it does not exist.
        file: Name of a file that is or will be in it; empty for the folder itself.

    Returns:
        A context that unlocks it at its end.

    Raises:
        ValueError: If another process has it.
        WriteError: If the folder cannot be made or written to.
    """
    folder = Path(folder)
    taken = FileLock(folder / (f".{file}.lock" if file else ".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return taken.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process writes to {folder / file}: wait until it has ended, or write elsewhere"
        ) from None
    except OSError as error:
        raise WriteError(folder, error.strerror or str(error)) from error


def only_writer(path: Path | None) -> AbstractContextManager[Any]:
    """A context in which no other process writes to a file.

    Args:
        path: The file, which may not exist yet; None locks nothing.

    Raises:
        ValueError: If another process does.
    """
    return nullcontext() if path is None else lock(path.parent, path.name)
