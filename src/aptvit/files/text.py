"""Text files as people save them: with a byte order mark, and under names that are not UTF-8."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from aptvit.files.regular import MAX_BYTES, read_regular

__all__ = ["printable", "read_json", "read_lines", "read_text", "read_yaml"]

_MAX_YAML = 10_000_000  # bytes
_MAX_DEPTH = 20  # of lists and names in YAML
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed and stored in a line.

    Bytes of a name that is not UTF-8, ends of lines, and characters that steer terminals become ``\\xNN``.
    """
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def read_text(path: Path | str, limit: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark; the mark is not part of the text.

    Args:
        path: The file.
        limit: Most bytes to read.

    Raises:
        ValueError: If the file cannot be read, is larger, or is in another encoding.
    """
    try:
        content = read_regular(path, limit)
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


def read_json(path: Path | str, limit: int = MAX_BYTES) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        limit: As for `read_text`.

    Raises:
        ValueError: As for `read_text`, or if the file is not JSON.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also of numbers with thousands of digits
        raise ValueError(f"{printable(path)} is not JSON: {' '.join(str(error).split())}") from None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read names and values in a YAML file; without aliases, by which a short file can stand for an endless one.

    Args:
        path: The file.

    Raises:
        ValueError: As for `read_text`, or if the file is not YAML or holds no names.
        ImportError: If PyYAML is not installed.
    """
    import yaml

    text = read_text(path, _MAX_YAML)
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has aliases (*name), write out what they stand for")
            if depth > _MAX_DEPTH:
                raise ValueError(f"values are nested more than {_MAX_DEPTH} deep")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise ValueError(f"{printable(path)} must hold names and values, such as 'epochs: 1'")
    return values or {}
