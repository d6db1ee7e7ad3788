"""Files that long measurements write row by row, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["check_same_environment", "write_json"]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON; an interruption leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def check_same_environment(path: Path, was: dict[str, str], now: dict[str, str]) -> None:
    """Make sure that new rows may stand beside those of a file.

    Raises:
        ValueError: If they were measured under other conditions; the message names the first that differs.
    """
    if was != now:
        label = next(key for key in {**now, **was} if was.get(key) != now.get(key))
        raise ValueError(
            f"{path} was measured with another {label} ({was.get(label)}, now {now.get(label)}): "
            "--fresh starts anew, another --name keeps it"
        )
