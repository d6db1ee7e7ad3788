"""Every method on the same images in one process: outputs first, then time beside the uniform model's.

images ── uniform logits ──┬── a method's logits ── right? the uniform's answer? ───┐
                           └── timed images, batch by batch: uniform, method ───────┴── a row ── JSON
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aptvit
from aptvit.evaluation.methods import UNIFORM, Conditions, Method, Prepared, Setup, prepare
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow, pack_bits
from aptvit.evaluation.statistics import agrees, cosine, is_correct
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images
from aptvit.files.labelled import LabelledImages, find_labelled
from aptvit.hosts.pretrained import Host
from aptvit.measuring.machine import digest_files, prepare_machine
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import paired_rounds

__all__ = ["run_evaluation"]


def run_evaluation(
    source: Path,
    load: Callable[[int | None], Host],
    name: str,
    methods: Sequence[Method],
    output: Path | None = None,
    *,
    sizes: Sequence[int | None] = (None,),
    conditions: Conditions | None = None,
    command: str | None = None,
    fresh: bool = False,
    progress: Progress = silent,
    done: Callable[[EvaluationRow], None] = lambda row: None,
) -> EvaluationRecord:
    """Run methods over images, one after the other: accuracy, agreement with the uniform model, tokens, FLOPs, time.

    Time runs from normalised images in memory to logits, scoring included, and is measured beside the uniform model's
    in one process, batch by batch, the first of the two alternating. A method that cannot run becomes a row that says
    why, and the next one follows.

    Args:
        source: Images, see `aptvit.files.labelled.find_labelled`.
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
    conditions = conditions or Conditions()
    if not sizes:
        raise ValueError("there are no sizes to evaluate at: give at least one, or None for the model's own")
    host = _checked(load(sizes[0]), name)
    num_classes: Any = host.model.num_classes
    photos = find_labelled(source, num_classes).spread(conditions.max_photos)
    record = EvaluationRecord.resume(output, _environment(name, host, photos, conditions), command, fresh)
    for size in dict.fromkeys(sizes):
        subject = _Subject(host if size == sizes[0] else _checked(load(size), name), photos, conditions, progress)
        wanted = [EvaluationRow(subject.size, method) for method in dict.fromkeys((UNIFORM, *methods))]
        if not all(map(record.has, wanted)):
            record.skipped = subject.skipped
        measure = partial(_measure, subject)
        record.measure(wanted, measure, output, progress=progress, done=done)
    return record


def _checked(host: Host, name: str) -> Host:
    _, height, width = host.data["input_size"]
    if host.weights == "random":
        raise ValueError(f"{name} has random weights, so its answers mean nothing: give it weights with --checkpoint")
    if not host.model.num_classes:
        raise ValueError(f"{name} has no classes, so it has no answers to be right or wrong: give a classifier")
    if height != width:
        raise ValueError(f"{name} reads images of {height} x {width}: only square ones are evaluated")
    return host


class _Subject:
    """A host at one size and the images that it reads; what is costly is computed at its first use."""

    def __init__(self, host: Host, photos: LabelledImages, conditions: Conditions, progress: Progress) -> None:
        host.model.to(conditions.device, conditions.dtype).requires_grad_(False)
        self.host, self.photos, self.conditions, self.progress = host, photos, conditions, progress
        self.size: int = host.data["input_size"][-1]
        self.setup = Setup(host, conditions, self._samples)
        self._read = lru_cache(maxsize=2)(self._read_at)  # the size itself, and one of the smaller ones

    def _read_at(self, side: int) -> LoadedImages:
        data = {**self.host.data, "input_size": (self.host.data["input_size"][0], side, side)}
        return read_images(self.photos.paths, data, self.progress)

    def _samples(self) -> NormalisedBatches:
        others = self.conditions.calibration
        photos = self._read(self.size) if others is None else read_images(others, self.host.data, self.progress)
        return self._batches_of(photos.pixels)

    @property
    def skipped(self) -> list[str]:
        return [*self.photos.skipped, *self._read(self.size).skipped]

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) of those images that could be read."""
        if self.photos.labels is None:
            return None
        label_of = dict(zip(self.photos.paths, self.photos.labels, strict=True))
        return torch.tensor([label_of[path] for path in self._read(self.size).paths])

    def batches(self, side: int) -> NormalisedBatches:
        return self._batches_of(self._read(side).pixels)

    def timed_batches(self, side: int) -> list[Tensor]:
        """Batches that are timed, all of them full if there are enough images."""
        pixels, batch = self._read(side).pixels, self.conditions.batch_size
        count = min(self.conditions.timed_photos, len(pixels))
        count = max(count // batch * batch, min(batch, count))
        return list(self._batches_of([pixels[i * len(pixels) // count] for i in range(count)]))

    def _batches_of(self, pixels: Sequence[Tensor]) -> NormalisedBatches:
        return NormalisedBatches(pixels, self.host.data, self.conditions.batch_size, self.conditions.device)

    @cached_property
    def uniform(self) -> Prepared:
        return prepare(UNIFORM, self.setup)

    @cached_property
    def uniform_outputs(self) -> tuple[Tensor, list[float]]:
        return self.outputs(self.uniform, "uniform")

    def outputs(self, prepared: Prepared, name: str) -> tuple[Tensor, list[float]]:
        """(N, C) logits in float32 on the CPU, and the tokens of each image; also the warm-up."""
        logits, tokens = [], []
        batches = self.batches(prepared.size)
        with torch.inference_mode():
            for images in self.progress(batches, f"running {name}", len(batches)):
                logits.append(prepared.run(images).float().cpu())
                tokens += prepared.tokens(images)
        return torch.cat(logits), tokens


def _measure(subject: _Subject, row: EvaluationRow) -> dict[str, Any]:
    """All fields of a row but its identity."""
    is_uniform = row.method == UNIFORM
    prepared = subject.uniform if is_uniform else prepare(row.method, subject.setup)
    reference, _ = subject.uniform_outputs
    logits, tokens = subject.uniform_outputs if is_uniform else subject.outputs(prepared, str(row.method))
    if not logits.isfinite().all():
        raise ValueError(f"some logits are not finite: {subject.conditions.dtype} is too narrow for this model")
    sides, device, gflops = (subject.uniform, prepared), subject.conditions.device, []
    inputs = [subject.timed_batches(side.size) for side in sides]
    for side, batches in zip(sides, inputs, strict=True):
        with torch.inference_mode(), countable_attention(side.model, device):
            flops = sum(count_flops(partial(side.run, images)) for images in batches)
        gflops.append(flops / sum(map(len, batches)) / 1e9)
    runs = [lambda pair: sides[0].run(pair[0]), lambda pair: sides[1].run(pair[1])]
    pairs = list(zip(*inputs, strict=True))
    with torch.inference_mode():
        seconds = paired_rounds(runs, pairs, subject.conditions.rounds, device, subject.progress)
    labels = subject.labels
    return {
        "setting": prepared.setting,
        "photos": len(logits),
        "tokens": sum(tokens) / len(tokens) / subject.setup.num_tokens,
        "cosine": float(cosine(logits, reference).mean()),
        "top1": None if labels is None else pack_bits(is_correct(logits, labels).numpy()),
        "top5": None if labels is None else pack_bits(is_correct(logits, labels, 5).numpy()),
        "agrees": pack_bits(agrees(logits, reference).numpy()),
        "gflops_uniform": gflops[0],
        "gflops": gflops[1],
        "seconds_uniform": tuple(seconds[0]),
        "seconds": tuple(seconds[1]),
    }


# What must be the same for rows to stand in one record


def _environment(name: str, host: Host, photos: LabelledImages, conditions: Conditions) -> dict[str, str]:
    weights, others, labels = Path(host.weights), conditions.calibration, photos.labels
    digest = hashlib.sha256(repr(list(labels or [])).encode()).hexdigest()[:12]
    return {
        "model": name,
        "weights": f"{weights.name} (sha256 {digest_files([weights])})" if weights.is_file() else host.weights,
        "photos": f"{len(photos.paths)} (sha256 {digest_files(photos.paths)})",
        "labels": photos.source if labels is None else f"{photos.source} (sha256 {digest})",
        "calibrated on": "these photos" if others is None else f"{len(others)} others (sha256 {digest_files(others)})",
        "type": str(conditions.dtype).removeprefix("torch."),
        "batch": str(conditions.batch_size),
        "timed photos": str(conditions.timed_photos),
        "scales": str(conditions.scales),
        **prepare_machine(conditions.device),
        "aptvit": aptvit.__version__,
    }
