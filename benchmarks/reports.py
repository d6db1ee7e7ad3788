"""The log of reports: each run of a command that reads images that nothing was chosen on adds a line.

Settings and weights are chosen on development images (`imagenet_sample`, the training images of BCCD and CamVid).
Numbers on the other images are reported once, by one command: the log shows how often they were looked at.
"""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["LOG", "note_report"]

LOG = Path(__file__).parent / "results" / "reports.md"


def note_report(images: str, command: str, log: Path = LOG) -> None:
    """Add a line to the log.

    Args:
        images: The images that are read.
        command: The command line.
        log: The file.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    day = datetime.now(UTC).date().isoformat()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"| {day} | {commit.stdout.strip() or 'unknown'} | {images} | `{command}` |\n")
