"""Speed of adaptive models against their uniform hosts, case by case: inference and training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import aptvit
from aptvit.benchmark.case import load_subject, measure_case
from aptvit.benchmark.record import Case, Record, Row, check_cases
from aptvit.files.images import ImageError, open_image
from aptvit.layers.kernels.attention_flash import available_backends
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.records import check_same_environment
from aptvit.measuring.timing import describe_device, describe_environment, keep_freed_memory

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
    done: Callable[[Row], None] = lambda row: None,
) -> Record:
    """Measure cases one after the other.

    Weights are random: they change neither the time nor, as patches are chosen from pixels, the tokens. A case that
    fails becomes a row with an error, and the rest goes on.

    Args:
        cases: What to measure; all on one device.
        photos: Image files. They are cut to full batches; fewer photos than a batch holds are repeated.
        output: JSON file, written after each case. Rows that it holds already are kept and not measured again.
        rounds: Timed rounds. Each takes every batch through both sides.
        command: Command line, for the record.
        fresh: Start anew, whatever the file holds.
        progress: Wraps the cases.
        done: Called with each new row.

    Raises:
        ValueError: If a case is wrong, no photo can be read, or the file is of another machine, version or photos.
    """
    cases = list(dict.fromkeys(cases))
    check_cases(cases)
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    readable, skipped = _readable(photos)
    record = _start(output, _environment(cases[0].device, readable), fresh)
    record.skipped = skipped
    if command is not None and command not in record.commands:
        record.commands.append(command)
    # Cases of one model and size come one after the other: one model at a time is kept.
    load = lru_cache(maxsize=1)(partial(load_subject, tuple(readable)))
    for case in progress(cases, "benchmarking", len(cases)):
        if record.find(case) is not None:
            continue
        row = measure_case(case, load, rounds)
        record.put(row)
        if output is not None:
            record.save(output)
        done(row)
    return record


def _readable(photos: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files that can be opened, and messages for the others."""
    if not photos:
        raise ValueError("there are no photos to measure on: give at least one")
    readable, skipped = [], []
    for path in photos:
        try:
            open_image(path, max_side=64)
            readable.append(path)
        except ImageError as error:
            skipped.append(str(error))
    if not readable:
        raise ValueError(f"none of {len(photos)} files can be read as an image; the first: {skipped[0]}")
    return readable, skipped


def _environment(device: str, photos: Sequence[Path]) -> dict[str, str]:
    """What must be the same for rows to stand in one record."""
    memory_kept = device == "cpu" and keep_freed_memory()
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in photos))
    environment = {
        "device": describe_device(device),
        **describe_environment(memory_kept),
        "aptvit": aptvit.__version__,
        "attention": ", ".join(available_backends()),
        "kernels": ", ".join(f"{name} {number}" for name, number in _kernel_versions().items()) or "none",
        "photos": f"{len(photos)} (sha256 {digest.hexdigest()[:12]})",
    }
    if device.startswith("cuda"):
        environment["cuda"] = str(torch.version.cuda)
    return environment


def _kernel_versions() -> dict[str, str]:
    """Optional compilers of kernels, where they are installed."""
    versions = {}
    for name in ("numba", "triton"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _start(output: Path | None, environment: dict[str, str], fresh: bool) -> Record:
    if output is None or fresh or not output.exists():
        return Record(environment)
    record = Record.load(output)
    check_same_environment(output, record.environment, environment)
    return record
