"""A hostile file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Case", "Payload", "pickle_that_runs"]


@dataclass(frozen=True)
class Case:
    """A hostile file, or a folder that becomes hostile.

    Attributes:
        name: What is wrong with it.
        kind: Which commands read it, see `commands.py`.
        file: Name of the file among the good ones; it contains "hostile", for which messages are searched.
        make: Writes the file to a path, or damages the good file or folder there.
        must_tell: Whether it cannot be right, so that a command must say something about it.
    """

    name: str
    kind: str
    file: str
    make: Callable[[Path, Payload], Any]
    must_tell: bool = True


@dataclass(frozen=True)
class Payload:
    """What an attack aims at.

    Attributes:
        canary: A file that nothing but code from a hostile file makes.
        url: Of a server on this machine that counts who connects.
    """

    canary: Path
    url: str


class _Runs:
    """Runs a command as it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


def pickle_that_runs(payload: Payload) -> Any:
    """An object whose pickle makes the canary."""
    return _Runs(f"touch '{payload.canary}'")
