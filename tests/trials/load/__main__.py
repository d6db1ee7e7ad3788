"""All loads at their full size, about half an hour: 100,000 images, 10,000 calls eager and compiled, 50 visitors.

python -m tests.trials.load --out benchmarks/results/load.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..results import Outcome, Result
from .calls import CALLS, call_often
from .embed import embed_many
from .page import VISITORS, visit_page

IMAGES, MINUTES = 100_000, 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trials.load", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table to a file")
    options = parser.parse_args()
    loads: tuple[Callable[[], list[Result]], ...] = (
        lambda: call_often(CALLS, False, 0),
        lambda: call_often(CALLS, True, 0),
        lambda: visit_page(VISITORS, time.monotonic() + 60 * MINUTES, 0),
        lambda: embed_many(IMAGES, 0),
    )
    results: list[Result] = []
    for load in loads:
        results += load()
        print(as_table(results), flush=True)
        if options.out is not None:
            write(options.out, as_table(results))
    return 0 if all(result.outcome is Outcome.RIGHT for result in results) else 1


def as_table(results: list[Result]) -> str:
    """What was tried, and what came of it, as Markdown."""
    rows = (f"| {result.name} | {result.outcome} | {result.detail} |" for result in results)
    return "\n".join(("| load | outcome | measured |", "| --- | --- | --- |", *rows))


def write(file: Path, table: str) -> None:
    from aptvit.measuring.machine import prepare_machine
    from aptvit.measuring.tables import markdown_page

    command = shlex.join(["python", "-m", "tests.trials.load", *sys.argv[1:]])
    file.write_text(markdown_page("Load", [command], prepare_machine("cpu"), table), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
