"""A benchmark: cases are measured one after the other, and written to a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import aptvit
from aptvit.benchmark.case import RandomHost, measure_case
from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Case, check_cases
from aptvit.files.images import open_image, read_each
from aptvit.layers.kernels.attention_flash import available_backends
from aptvit.measuring.machine import digest_files, prepare_machine
from aptvit.measuring.progress import Progress, silent

__all__ = ["run_benchmark"]


def run_benchmark(
    cases: Sequence[Case],
    images: Sequence[Path],
    output: Path | None = None,
    *,
    rounds: int = 5,
    command: str | None = None,
    fresh: bool = False,
    progress: Progress = silent,
    done: Callable[[BenchmarkRow], None] = lambda row: None,
) -> BenchmarkRecord:
    """Measure cases one after the other.

    Weights are random: they change neither the time nor, as patches are chosen from pixels, the tokens. The error of a
    case is recorded in its row, and the next case follows.

    Args:
        cases: The cases; all on one device.
        images: Image files. They are cut to full batches; fewer images than a batch holds are repeated.
        output: JSON file, written after each case. Rows in the file are kept and not measured again.
        rounds: Timed rounds. In a round each batch goes through both models.
        command: Command line, for the record.
        fresh: Ignore the rows in the file.
        progress: Wraps the cases.
        done: Called with each new row.

    Raises:
        ValueError: If a value is invalid, no image can be read, or the file is of another machine, version or other
            images.
    """
    cases = list(dict.fromkeys(cases))
    check_cases(cases)
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    if not images:
        raise ValueError("there are no photos to measure on: give at least one")
    readable, skipped = read_each(images, partial(open_image, max_side=64))
    paths = tuple(path for path, _ in readable)
    record = BenchmarkRecord.resume(output, _environment(cases[0].device, paths), command, fresh)
    record.skipped = skipped
    # Cases of one model and size are consecutive: one host at a time is in memory.
    load = lru_cache(maxsize=1)(partial(RandomHost, paths))
    measure = partial(measure_case, load=load, rounds=rounds)
    record.measure([BenchmarkRow(case) for case in cases], measure, output, progress=progress, done=done)
    return record


def _environment(device: str, images: Sequence[Path]) -> dict[str, str]:
    """The conditions of a record by label, equal for all rows."""
    kernels = []
    for name in ("numba", "triton"):  # optional
        with suppress(PackageNotFoundError):
            kernels.append(f"{name} {version(name)}")
    return {
        **prepare_machine(device),
        "aptvit": aptvit.__version__,
        "attention": ", ".join(available_backends()),
        "kernels": ", ".join(kernels) or "none",
        "photos": f"{len(images)} (sha256 {digest_files(images)})",
        **({"cuda": str(torch.version.cuda)} if device.startswith("cuda") else {}),
    }
