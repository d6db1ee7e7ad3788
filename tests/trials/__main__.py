"""Run the trials, print what came of them, and exit with 1 if anything was at fault."""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import aptvit

from .kinds import KINDS, send_results
from .results import Outcome, Result, as_table


def _results_of(kind: str, seconds: float, seed: int) -> list[Result]:
    """Run a kind in a process of its own: a trial may leave threads and changed libraries behind."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_results, args=(kind, seconds, seed, sender))
    process.start()
    sender.close()
    results: list[Result] = []
    try:
        while (result := receiver.recv()) is not None:
            results.append(result)
            if len(results) % 100 == 0:
                print(f"{kind}: {len(results)} tries", file=sys.stderr, flush=True)
            if result.outcome is not Outcome.RIGHT:
                print(f"{kind}: {result.outcome.upper()}: {result.name}\n    {result.detail}", flush=True)
    except EOFError:
        results.append(Result(kind, Outcome.CRASHED, "the trial itself ended early"))
    process.join()
    return results


def _write(file: Path, table: str, minutes: float) -> None:
    from aptvit.measuring.machine import prepare_machine
    from aptvit.measuring.tables import markdown_page

    command = shlex.join(["python", "-m", "tests.trials", *sys.argv[1:]])
    environment = {**prepare_machine("cpu"), "aptvit": aptvit.__version__, "minutes": f"{minutes:.0f}"}
    file.write_text(markdown_page("Trials", [command], environment, table), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trials", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="minutes in all, shared by the kinds")
    parser.add_argument("--only", action="append", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table to a file")
    options = parser.parse_args()
    kinds = options.only or list(KINDS)
    counts: dict[str, Counter[Outcome]] = {}
    started = time.monotonic()
    for number, kind in enumerate(kinds):
        seconds = (60 * options.minutes - (time.monotonic() - started)) / (len(kinds) - number)
        counts[kind] = Counter(result.outcome for result in _results_of(kind, seconds, options.seed))
    print(as_table(counts))
    if options.out is not None:
        _write(options.out, as_table(counts), (time.monotonic() - started) / 60)
    faults = sum(count for kind in counts.values() for outcome, count in kind.items() if outcome is not Outcome.RIGHT)
    return 1 if faults or not all(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
