"""Text files as people save them: with a byte order mark, and under names that are not UTF-8."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

__all__ = ["printable", "read_json", "read_lines", "read_text"]

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed and stored: bytes of a name that is not UTF-8 become ``\\xNN``."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_text(path: Path | str) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark; the mark is not part of the text.

    Raises:
        ValueError: If the file cannot be read or is in another encoding.
    """
    try:
        content = Path(path).read_bytes()
        encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
        return content.decode(encoding)
    except OSError as error:
        raise ValueError(f"cannot read {printable(path)}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(path)} is not text in UTF-8 (byte {error.start}): save it again in UTF-8"
        ) from None


def read_lines(path: Path | str) -> list[str]:
    """Read the lines of a text file, without surrounding spaces and without empty lines.

    Raises:
        ValueError: As for `read_text`.
    """
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: As for `read_text`, or if the file is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{printable(path)} is not JSON: {error}") from None
