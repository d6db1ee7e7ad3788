"""Write files: under a temporary name in the same folder, flushed to disk and renamed, so complete or unchanged.

Needs no torch: the command line imports it before anything slow.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "WriteError",
    "digest_file",
    "flush",
    "free_bytes",
    "replacing",
    "save_model",
    "save_state",
    "save_weights",
    "write_bytes",
    "write_json",
    "write_text",
]

_FULL = (errno.ENOSPC, errno.EDQUOT)


class WriteError(OSError):
    """A file that cannot be written; its earlier contents are unchanged.

    Args:
        path: The file.
        reason: The reason, which is ``strerror`` of the error.
        is_full: Whether there is no room on the disk.
    """

    def __init__(self, path: Path | str, reason: str, is_full: bool = False) -> None:
        super().__init__(f"cannot write {path}: {reason}")
        self.strerror, self.is_full = reason, is_full


@contextmanager
def replacing(path: Path | str, size: int = 0) -> Iterator[Path]:
    """Context that writes a file: to a temporary path, which replaces the file at the end, or is removed on an error.

    The folder is made if it does not exist.

    Args:
        path: The file.
        size: Number of bytes that will be written, if it is known: the room on the disk is checked first.

    Yields:
        The temporary path, in the same folder and with the same suffix.

    Raises:
        WriteError: If the file cannot be written; the message says how much room it needs.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    draft = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        free = free_bytes(target.parent)
        if free is not None and size > free:
            raise OSError(errno.ENOSPC, "No space left on device")
        yield draft
        flush(draft)
        os.replace(draft, target)
        flush(target.parent)
    except Exception as error:
        _remove(draft)
        # safetensors and torch wrap the error of the operating system in others, or in text.
        if not isinstance(error, WriteError) and (isinstance(error, OSError) or _error_number(error) is not None):
            raise _write_error(Path(path), error, size) from error
        raise
    except BaseException:
        _remove(draft)
        raise


def _remove(draft: Path) -> None:
    with suppress(OSError):  # the reason why it could not be written is told instead
        draft.unlink(missing_ok=True)


def _remove_abandoned(target: Path) -> None:
    """Remove the drafts of a file that killed processes left."""
    start, end = f".{target.stem}.", f".part{target.suffix}"
    for draft in target.parent.glob(f"{glob.escape(start)}*{glob.escape(end)}"):
        number = draft.name[len(start) : -len(end)]
        if number.isdecimal() and int(number) != os.getpid() and not _is_running(int(number)):
            _remove(draft)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _error_number(error: BaseException | None) -> int | None:
    """Number of the error of the operating system that an error is, tells of, or was caused by."""
    if error is None:
        return None
    in_text = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    number = int(in_text[1]) if in_text else getattr(error, "errno", None)
    return _error_number(error.__cause__ or error.__context__) if number is None else number


def _write_error(path: Path, error: BaseException, size: int) -> WriteError:
    number = _error_number(error)
    if number in _FULL:
        free, needs = free_bytes(path.parent), f"it needs {_in_words(size)}, " if size else ""
        room = "" if free is None else f" ({needs}{_in_words(free)} are free)"
        return WriteError(path, f"the disk is full{room}; make room there, or choose another disk", True)
    return WriteError(path, os.strerror(number) if number is not None else " ".join(str(error).split())[:200])


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_bytes(folder: Path) -> int | None:
    """Number of free bytes on the disk of a folder; None if the file system does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush, most of them remote
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file.

    Raises:
        WriteError: As for `replacing`.
    """
    with replacing(path, len(content)) as draft:
        draft.write_bytes(content)


def write_text(path: Path | str, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8.

    Args:
        path: The file.
        text: The text.
        errors: What happens to characters that have no UTF-8, as for ``str.encode``.

    Raises:
        WriteError: As for `replacing`.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path | str, values: Any, indent: int = 2) -> None:
    """Write values as JSON.

    Raises:
        WriteError: As for `replacing`.
    """
    write_text(path, json.dumps(values, indent=indent) + "\n")


def save_weights(weights: Mapping[str, Tensor], path: Path | str) -> None:
    """Write a state dict to a safetensors file.

    Args:
        weights: Tensors on any device.
        path: The file.

    Raises:
        WriteError: As for `replacing`.
    """
    from safetensors.torch import save_file  # imports torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as draft:
        save_file(tensors, draft, {"format": "pt"})


def save_model(folder: Path, weights: Mapping[str, Tensor], config: Any) -> None:
    """Write ``model.safetensors`` and ``config.json`` of a model, both or neither.

    Args:
        folder: An existing folder.
        weights: State dict.
        config: Values for JSON.

    Raises:
        WriteError: As for `replacing`.
    """
    with replacing(folder / "config.json") as draft:
        draft.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_weights(weights, folder / "model.safetensors")


def save_state(state: Any, path: Path | str) -> None:
    """Write nested values with tensors, for ``torch.load(path, weights_only=True)``.

    Raises:
        WriteError: As for `replacing`.
    """
    import torch

    with replacing(path) as draft, draft.open("wb") as file:
        torch.save(state, file)


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
