"""Speed of adaptive models against their uniform hosts, case by case: inference and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import aptvit
from aptvit.benchmark.case import Subject, measure_case
from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Case, check_cases
from aptvit.files.images import open_image, read_each
from aptvit.layers.kernels.attention_flash import available_backends
from aptvit.measuring.machine import digest_files, prepare_machine
from aptvit.measuring.progress import Progress, silent

__all__ = ["run_benchmark"]


def run_benchmark(
    cases: Sequence[Case],
    photos: Sequence[Path],
    output: Path | None = None,
    *,
    rounds: int = 5,
    command: str | None = None,
    fresh: bool = False,
    progress: Progress = silent,
    done: Callable[[BenchmarkRow], None] = lambda row: None,
) -> BenchmarkRecord:
    """Measure cases one after the other.

    Weights are random: they change neither the time nor, as patches are chosen from pixels, the tokens. A case that
    fails becomes a row with an error, and the next one follows.

    Args:
        cases: What to measure; all on one device.
        photos: Image files. They are cut to full batches; fewer than a batch holds are repeated.
        output: JSON file, written after each case. Rows that it holds already are kept and not measured again.
        rounds: Timed rounds. Each takes every batch through both sides.
        command: Command line, for the record.
        fresh: Start anew, whatever the file holds.
        progress: Wraps the cases.
        done: Called with each new row.

    Raises:
        ValueError: If a value is wrong, no photo can be read, or the file is of another machine, version or photos.
    """
    cases = list(dict.fromkeys(cases))
    check_cases(cases)
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    if not photos:
        raise ValueError("there are no photos to measure on: give at least one")
    readable, skipped = read_each(photos, partial(open_image, max_side=64))
    paths = tuple(path for path, _ in readable)
    record = BenchmarkRecord.resume(output, _environment(cases[0].device, paths), command, fresh)
    record.skipped = skipped
    # Cases of one model and size come one after the other: one model at a time is kept.
    load = lru_cache(maxsize=1)(partial(Subject, paths))
    wanted = [BenchmarkRow(case) for case in cases]
    measure = partial(measure_case, load=load, rounds=rounds)
    record.measure(wanted, measure, output, progress=progress, done=done)
    return record


def _environment(device: str, photos: Sequence[Path]) -> dict[str, str]:
    """What must be the same for rows to stand in one record."""
    kernels = []
    for name in ("numba", "triton"):  # optional
        with suppress(PackageNotFoundError):
            kernels.append(f"{name} {version(name)}")
    return {
        **prepare_machine(device),
        "aptvit": aptvit.__version__,
        "attention": ", ".join(available_backends()),
        "kernels": ", ".join(kernels) or "none",
        "photos": f"{len(photos)} (sha256 {digest_files(photos)})",
        **({"cuda": str(torch.version.cuda)} if device.startswith("cuda") else {}),
    }
