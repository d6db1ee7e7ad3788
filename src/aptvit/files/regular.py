"""The one place where files that others wrote are opened: regular files only, and never more bytes than expected."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import tarfile

__all__ = ["MAX_BYTES", "check_end_of_tar", "is_regular", "open_regular", "read_part", "read_regular"]

MAX_BYTES = 2**31
"""Largest file that is read at once, in bytes."""


def is_regular(path: Path | str) -> bool:
    """Whether there is a regular file of a name that somebody wrote down: such names may be too long, or no names."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file to read its bytes, if it is a regular file or a link to one.

    Reading a pipe or a device may never end.

    Args:
        path: The file.

    Raises:
        OSError: If there is no such file, or it is a folder, a pipe, a socket or a device.
    """
    # Without blocking, opening a pipe does not wait for somebody to write to it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "this is a pipe, a socket or a device, not a regular file", str(path))


def read_regular(path: Path | str, limit: int = MAX_BYTES) -> bytes:
    """Read a whole file, as `open_regular` opens it.

    Args:
        path: The file.
        limit: Most bytes to read.

    Raises:
        OSError: As for `open_regular`, or if the file is larger.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            content = file.read(limit + 1)  # the size of some files, as in /proc, says nothing
            if len(content) <= limit:
                return content
    raise OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that are read", str(path))


def read_part(path: Path | str, offset: int, size: int) -> bytes:
    """Read a part of a file, as `open_regular` opens it.

    Args:
        path: The file.
        offset: Position of the first byte.
        size: Number of bytes.

    Raises:
        OSError: As for `open_regular`, or if the file ends before.
    """
    with open_regular(path) as file:
        if not (offset >= 0 and 0 <= size <= os.fstat(file.fileno()).st_size - offset and size <= MAX_BYTES):
            raise OSError(errno.EINVAL, "the file ends before the image does", str(path))
        file.seek(offset)
        return file.read(size)


def check_end_of_tar(tar: tarfile.TarFile, file: Any) -> None:
    """Check that a tar file whose members were listed ends with its mark: one that was cut between members does not.

    Args:
        tar: The tar file.
        file: The open file that it is read from.

    Raises:
        ValueError: If it was cut.
    """
    file.seek(tar.offset)
    block = file.read(512)
    if len(block) < 512 or any(block):
        raise ValueError("it was cut: the mark at the end of a tar file is missing")
