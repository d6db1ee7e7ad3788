"""The map: every method on the same photos in one process, outputs first, then time beside the uniform model's.

photos ── uniform logits ──┬── a method's logits ── right? the uniform's answer? ──┐
                           └── timed photos, batch by batch: uniform, method ──────┴── a row ── JSON
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aptvit
from aptvit.evaluation.methods import UNIFORM, Method, Prepared, Surroundings, prepare
from aptvit.evaluation.metrics import agrees, cosine, is_correct
from aptvit.evaluation.record import Record, Row, pack_bits
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images
from aptvit.files.labelled import LabelledImages, find_labelled
from aptvit.hosts.pretrained import Host
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.records import check_same_environment
from aptvit.measuring.timing import (
    count_flops,
    countable_attention,
    describe_device,
    describe_environment,
    interleaved,
    keep_freed_memory,
)
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["Conditions", "run_evaluation"]


@dataclass(frozen=True)
class Conditions:
    """How all methods run.

    Attributes:
        dtype: Type to compute in.
        device: Where to.
        batch_size: Photos per batch.
        timed_photos: Photos that are timed, spread evenly over all of them.
        rounds: How often they are timed.
        scales: Patch sizes of adaptive models, the base size included.
        max_photos: Use at most that many photos, spread evenly.
        calibration: Other photos, for methods that want to see some before; those that are measured if None.
        fit_steps: Batches of these that a method is fitted on (DTEM; nothing else here is trained).
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int = 8
    timed_photos: int = 64
    rounds: int = 5
    scales: int = 2
    max_photos: int | None = None
    calibration: tuple[Path, ...] | None = None
    fit_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "timed_photos", "rounds", "fit_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.scales < 2:
            raise ValueError(f"scales={self.scales} must be at least 2: one scale merges nothing")


def run_evaluation(
    source: Path,
    load: Callable[[int | None], Host],
    name: str,
    methods: Sequence[Method],
    output: Path | None = None,
    *,
    sizes: Sequence[int | None] = (None,),
    conditions: Conditions = Conditions(),
    command: str | None = None,
    fresh: bool = False,
    progress: Progress = silent,
    done: Callable[[Row], None] = lambda row: None,
) -> Record:
    """Run methods over photos, one after the other: accuracy, agreement with the uniform model, tokens, FLOPs, time.

    Time runs from normalised images in memory to logits, scoring included, and is measured beside the uniform model's
    in one process, batch by batch, the first of the two alternating. A method that cannot run becomes a row that says
    why, and the rest goes on.

    Args:
        source: Photos, see `aptvit.evaluation.find_labelled`.
        load: Gives the host for a side of the input in pixels, the model's own if None.
        name: Name of the model, for the report.
        methods: From `parse_methods`.
        output: JSON file, written after each row. Rows that it holds already are kept and not measured again.
        sizes: Sides of the input in pixels.
        conditions: How they run.
        command: Command line, for the record.
        fresh: Start anew, whatever the file holds.
        progress: Wraps long work.
        done: Called with each new row.

    Raises:
        ValueError: If no photo can be read, labels are wrong, the model has no weights or no classes, or the file is of
            another machine, version, model or photos.
    """
    if not sizes:
        raise ValueError("there are no sizes to evaluate at: give at least one, or None for the model's own")
    load_once = lru_cache(maxsize=1)(load)  # one model at a time is kept
    host = _checked(load_once(sizes[0]), name)
    num_classes = host.model.num_classes
    assert isinstance(num_classes, int)
    photos = find_labelled(source, num_classes).spread(conditions.max_photos)
    record = _start(output, _environment(name, host, photos, conditions), fresh)

    @lru_cache(maxsize=1)
    def subject_at(size: int | None) -> _Subject:
        return _Subject(_checked(load_once(size), name), photos, conditions, progress)

    if command is not None and command not in record.commands:
        record.commands.append(command)
    wanted = [(size, method) for size in dict.fromkeys(sizes) for method in dict.fromkeys((UNIFORM, *methods))]
    for size, method in progress(wanted, "evaluating", len(wanted)):
        subject = subject_at(size)
        if record.find(subject.size, method) is not None:
            continue
        record.skipped = subject.skipped
        row = _measure(method, subject)
        record.put(row)
        if output is not None:
            record.save(output)
        done(row)
    return record


def _checked(host: Host, name: str) -> Host:
    _, height, width = host.data["input_size"]
    if host.weights == "random":
        raise ValueError(f"{name} has random weights, so its answers mean nothing: give it weights with --checkpoint")
    if not host.model.num_classes:
        raise ValueError(f"{name} has no classes, so it has no answers to be right or wrong: give a classifier")
    if height != width:
        raise ValueError(f"{name} reads pictures of {height} x {width}: only square ones are evaluated")
    return host


class _Subject:
    """A host at one size and the pictures that it reads; what is costly is made when it is asked for."""

    def __init__(self, host: Host, photos: LabelledImages, conditions: Conditions, progress: Progress) -> None:
        host.model.to(conditions.device, conditions.dtype).requires_grad_(False)
        self.host, self.photos, self.conditions, self.progress = host, photos, conditions, progress
        self.size: int = host.data["input_size"][-1]
        self._read = lru_cache(maxsize=2)(self._read_at)  # the size itself, and one of the smaller ones

    def _read_at(self, side: int) -> LoadedImages:
        data = {**self.host.data, "input_size": (self.host.data["input_size"][0], side, side)}
        return read_images(self.photos.paths, data, self.progress)

    @property
    def skipped(self) -> list[str]:
        return [*self.photos.skipped, *self._read(self.size).skipped]

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) of those photos that could be read."""
        if self.photos.labels is None:
            return None
        known = dict(zip(self.photos.paths, self.photos.labels, strict=True))
        return torch.tensor([known[path] for path in self._read(self.size).paths])

    def batches(self, side: int | None = None) -> NormalisedBatches:
        return self._batches_of(self._read(side or self.size).pixels)

    def timed_batches(self, side: int | None = None) -> list[Tensor]:
        """Batches that are timed, all of them full if there are enough photos."""
        pixels, batch = self._read(side or self.size).pixels, self.conditions.batch_size
        count = min(self.conditions.timed_photos, len(pixels))
        count = max(count // batch * batch, min(batch, count))
        return list(self._batches_of([pixels[i * len(pixels) // count] for i in range(count)]))

    def _batches_of(self, pixels: Sequence[Tensor]) -> NormalisedBatches:
        return NormalisedBatches(pixels, self.host.data, self.conditions.batch_size, self.conditions.device)

    @cached_property
    def surroundings(self) -> Surroundings:
        given = self.conditions
        others = given.calibration is not None
        return Surroundings(self.host, given.dtype, given.scales, self._samples, others, given.fit_steps)

    def _samples(self) -> NormalisedBatches:
        others = self.conditions.calibration
        if others is None:
            return self.batches()
        return self._batches_of(read_images(others, self.host.data, self.progress).pixels)

    @cached_property
    def uniform(self) -> Prepared:
        return prepare(UNIFORM, self.surroundings)

    @cached_property
    def uniform_logits(self) -> Tensor:
        """(N, C)"""
        return _outputs(self.uniform, self.batches(), "running uniform", self.progress)[0]


def _measure(method: Method, subject: _Subject) -> Row:
    """One row; a failure becomes a row with an error."""
    try:
        prepared = subject.uniform if method == UNIFORM else prepare(method, subject.surroundings)
        return Row(subject.size, method, setting=prepared.setting, **_found(method, prepared, subject))
    except Exception as error:  # out of memory has many names; whatever it is, the other methods go on
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return Row(subject.size, method, error=f"{kind}{lines[0]}")
    finally:
        gc.collect()
        if subject.conditions.device.startswith("cuda"):
            torch.cuda.empty_cache()


@torch.inference_mode()
def _found(method: Method, prepared: Prepared, subject: _Subject) -> dict[str, Any]:
    reference, tokens = subject.uniform_logits, [float(subject.surroundings.num_tokens)]
    logits = reference
    if method != UNIFORM:
        logits, tokens = _outputs(prepared, subject.batches(prepared.size), f"running {method}", subject.progress)
    if not logits.isfinite().all():
        raise ValueError(f"some logits are not finite: {subject.conditions.dtype} is too narrow for this model")
    labels = subject.labels
    return {
        "photos": len(logits),
        "tokens": sum(tokens) / len(tokens) / subject.surroundings.num_tokens,
        "cosine": float(cosine(logits, reference).mean()),
        "top1": None if labels is None else pack_bits(is_correct(logits, labels).numpy()),
        "top5": None if labels is None else pack_bits(is_correct(logits, labels, 5).numpy()),
        "agrees": pack_bits(agrees(logits, reference).numpy()),
        **_cost(prepared, subject),
    }


def _outputs(
    prepared: Prepared, batches: NormalisedBatches, what: str, progress: Progress
) -> tuple[Tensor, list[float]]:
    """(N, C) logits in float32 on the CPU, and the tokens of each photo; also the warm-up."""
    logits, tokens = [], []
    with torch.inference_mode():
        for images in progress(batches, what, len(batches)):
            logits.append(prepared.run(images).float().cpu())
            tokens += prepared.tokens(images)
    return torch.cat(logits), tokens


def _cost(prepared: Prepared, subject: _Subject) -> dict[str, Any]:
    """Operations and time of the timed photos, beside the uniform model."""
    sides = (subject.uniform, prepared)
    inputs = [subject.timed_batches(one.size) for one in sides]
    photos = sum(map(len, inputs[0]))
    flops = [sum(_flops(one, images) for images in mine) for one, mine in zip(sides, inputs, strict=True)]
    seconds: tuple[list[float], list[float]] = ([], [])
    rounds = subject.conditions.rounds
    for step in subject.progress(range(rounds), "timing", rounds):
        for kept, total in zip(seconds, _round(sides, inputs, subject.conditions.device, step), strict=True):
            kept.append(total)
    return {
        "gflops_uniform": flops[0] / photos / 1e9,
        "gflops": flops[1] / photos / 1e9,
        "seconds_uniform": tuple(seconds[0]),
        "seconds": tuple(seconds[1]),
    }


def _flops(prepared: Prepared, images: Tensor) -> int:
    adaptive = isinstance(prepared.model, AdaptivePatchTransformer)
    with countable_attention(prepared.model, images.device) if adaptive else nullcontext():
        return count_flops(partial(prepared.run, images))


def _round(sides: Sequence[Prepared], inputs: Sequence[Sequence[Tensor]], device: str, step: int) -> list[float]:
    """Seconds of each side over all batches: a batch goes through both before the next."""
    totals = [0.0] * len(sides)
    for number, batch in enumerate(zip(*inputs, strict=True)):
        runs = [partial(one.run, images) for one, images in zip(sides, batch, strict=True)]
        once = interleaved(runs, 1, device, first=step + number)
        totals = [total + seconds[0] for total, seconds in zip(totals, once, strict=True)]
    return totals


# What must be the same for rows to stand in one record


def _environment(name: str, host: Host, photos: LabelledImages, conditions: Conditions) -> dict[str, str]:
    memory_kept = conditions.device == "cpu" and keep_freed_memory()
    weights = Path(host.weights)
    others = conditions.calibration
    return {
        "model": name,
        "weights": f"{weights.name} (sha256 {_digest([weights])})" if weights.is_file() else host.weights,
        "photos": f"{len(photos.paths)} (sha256 {_digest(photos.paths)})",
        "labels": photos.source if photos.labels is None else f"{photos.source} (sha256 {_digest_of(photos.labels)})",
        "calibrated on": "these photos" if others is None else f"{len(others)} others (sha256 {_digest(others)})",
        "type": str(conditions.dtype).removeprefix("torch."),
        "batch": str(conditions.batch_size),
        "timed photos": str(conditions.timed_photos),
        "scales": str(conditions.scales),
        "device": describe_device(conditions.device),
        **describe_environment(memory_kept),
        "aptvit": aptvit.__version__,
    }


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:
            digest.update(path.name.encode())  # said to be unreadable when it is opened
    return digest.hexdigest()[:12]


def _digest_of(labels: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(labels)).encode()).hexdigest()[:12]


def _start(output: Path | None, environment: dict[str, str], fresh: bool) -> Record:
    if output is None or fresh or not output.exists():
        return Record(environment)
    record = Record.load(output)
    check_same_environment(output, record.environment, environment)
    return record
