"""An evaluation: every method on the same images in one process, first its outputs, then its time.

images ── uniform logits ──┬── logits of a method ── correct? same top-1? ──────────┐
                           └── timed images, batch by batch: uniform, method ───────┴── a row ── JSON
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.datasets.labelled import LabelledImages, find_labelled
from aptvit.evaluation.methods import UNIFORM, Conditions, Method, Prepared, Setup, prepare
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow, pack_bits
from aptvit.evaluation.statistics import agrees, is_correct
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images
from aptvit.hosts.pretrained import Host, class_names
from aptvit.measuring.machine import digest_files, prepare_machine
from aptvit.measuring.operations import mean_gflops
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import paired_rounds
from aptvit.storage.locking import only_writer
from aptvit.training.agreement import describe_host

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
    """Run methods over images: accuracy, agreement with the uniform model, tokens, FLOPs and time of each.

    Time is from normalised images in memory to logits, scoring included. A method and the uniform model are timed in
    one process, batch by batch in alternating order. A method that cannot run becomes a row with an error, and the next
    method follows.

    Args:
        source: Images, see `aptvit.datasets.labelled.find_labelled`.
        load: (side of the input in pixels, or None for the model's own) -> host.
        name: Name of the model, for the report.
        methods: From `parse_methods`.
        output: JSON file, written after each row. Rows in the file are kept and not measured again.
        sizes: Sides of the input in pixels.
        conditions: Conditions of all methods.
        command: Command line, for the record.
        fresh: Ignore the rows in the file.
        progress: Wraps long work.
        done: Called with each new row.

    Raises:
        ValueError: If no image can be read, labels are invalid, the model has no weights or no classes, or the file is
            of another machine, version, model or other images.
    """
    conditions = conditions or Conditions()
    if not sizes:
        raise ValueError("there are no sizes to evaluate at: give at least one, or None for the model's own")
    host = _checked(load(sizes[0]), name)
    num_classes: Any = host.model.num_classes
    files = find_labelled(source, num_classes, class_names(host.model) or ()).spread(conditions.max_images)
    with only_writer(output):
        record = EvaluationRecord.resume(output, _environment(name, host, files, conditions), command, fresh)
        for size in dict.fromkeys(sizes):
            inputs = _HostInputs(host if size == sizes[0] else _checked(load(size), name), files, conditions, progress)
            rows = [EvaluationRow(inputs.size, method) for method in dict.fromkeys((UNIFORM, *methods))]
            if not all(map(record.has, rows)):
                record.skipped = [*files.skipped, *inputs.read(inputs.size).skipped]
            record.measure(rows, partial(_measure, inputs), output, progress=progress, done=done)
        return record


def _checked(host: Host, name: str) -> Host:
    _, height, width = host.data["input_size"]
    if host.weights == "random":
        raise ValueError(f"{name} has random weights: give trained weights with --checkpoint")
    if not host.model.num_classes:
        raise ValueError(f"{name} has no classes and no predictions to evaluate: give a classifier")
    if height != width:
        raise ValueError(f"{name} reads images of {height} x {width}: only square images are evaluated")
    return host


class _HostInputs(Setup):
    """A host at one size, its images at this size and smaller ones, and its logits."""

    def __init__(self, host: Host, files: LabelledImages, conditions: Conditions, progress: Progress) -> None:
        host.model.to(conditions.device, conditions.dtype).requires_grad_(False)
        super().__init__(host, conditions, self._samples)
        self.files, self.progress, self.uniform = files, progress, prepare(UNIFORM, self)
        self.read = lru_cache(maxsize=2)(self._read)  # the size of the host, and a smaller one

    def _read(self, side: int) -> LoadedImages:
        return read_images(self.files.paths, self.host.data, self.progress, side)

    def _samples(self) -> NormalisedBatches:
        files = self.conditions.calibration
        images = self.read(self.size) if files is None else read_images(files, self.host.data, self.progress)
        return self._batches(images.pixels)

    def _batches(self, pixels: Sequence[Tensor]) -> NormalisedBatches:
        return NormalisedBatches(pixels, self.host.data, self.conditions.batch_size, self.conditions.device)

    def labels(self) -> Tensor | None:
        """(N,) class indices of the images that could be read; None without labels."""
        if self.files.labels is None:
            return None
        label_of = dict(zip(self.files.paths, self.files.labels, strict=True))
        return torch.tensor([label_of[path] for path in self.read(self.size).paths])

    def timed_batches(self, side: int) -> list[Tensor]:
        """The batches that are timed, all of them full if there are enough images."""
        pixels, batch = self.read(side).pixels, self.conditions.batch_size
        count = min(self.conditions.timed_images, len(pixels))
        count = max(count // batch * batch, min(batch, count))
        return list(self._batches([pixels[i * len(pixels) // count] for i in range(count)]))

    @cached_property
    def uniform_outputs(self) -> tuple[Tensor, list[float]]:
        return self.outputs(self.uniform, "uniform")

    @torch.inference_mode()
    def outputs(self, prepared: Prepared, name: str) -> tuple[Tensor, list[float]]:
        """(N, C) logits in float32 on the CPU, and the tokens of each image; also the warm-up."""
        logits, tokens = [], []
        batches = self._batches(self.read(prepared.size).pixels)
        for images in self.progress(batches, f"running {name}", len(batches)):
            logits.append(prepared.run(images).float().cpu())
            tokens += prepared.tokens(images)
        return torch.cat(logits), tokens


def _measure(inputs: _HostInputs, row: EvaluationRow) -> dict[str, Any]:
    """All fields of a row except its identity."""
    conditions, is_uniform = inputs.conditions, row.method == UNIFORM
    prepared = inputs.uniform if is_uniform else prepare(row.method, inputs)
    reference, _ = inputs.uniform_outputs
    logits, tokens = inputs.uniform_outputs if is_uniform else inputs.outputs(prepared, str(row.method))
    if not logits.isfinite().all():
        raise ValueError(f"some logits are not finite: {conditions.dtype} is too narrow for this model")
    sides = inputs.uniform, prepared
    batches = [inputs.timed_batches(side.size) for side in sides]
    with torch.inference_mode():
        inputs_of_sides = zip(sides, batches, strict=True)
        gflops = [mean_gflops(side.model, side.run, images, conditions.device) for side, images in inputs_of_sides]
        runs = [lambda pair: sides[0].run(pair[0]), lambda pair: sides[1].run(pair[1])]
        pairs = list(zip(*batches, strict=True))
        seconds = paired_rounds(runs, pairs, conditions.rounds, conditions.device, inputs.progress)
    labels = inputs.labels()
    correct = {} if labels is None else {f"top{k}": pack_bits(is_correct(logits, labels, k)) for k in (1, 5)}
    return {
        "setting": prepared.setting,
        "photos": len(logits),
        "tokens": sum(tokens) / len(tokens) / inputs.num_tokens,
        "cosine": float(F.cosine_similarity(logits.double(), reference.double()).mean()),
        **correct,
        "agrees": pack_bits(agrees(logits, reference)),
        "gflops_uniform": gflops[0],
        "gflops": gflops[1],
        "seconds_uniform": tuple(seconds[0]),
        "seconds": tuple(seconds[1]),
    }


def _environment(name: str, host: Host, images: LabelledImages, conditions: Conditions) -> dict[str, str]:
    """The conditions of a record by label, equal for all rows."""
    files, labels = conditions.calibration, images.labels
    digest = hashlib.sha256(repr(list(labels or [])).encode()).hexdigest()[:12]
    return {
        "model": name,
        "weights": f"{Path(host.weights).name} ({describe_host(host)['weights of the model']})",
        "photos": f"{len(images.paths)} (sha256 {digest_files(images.paths)})",
        "labels": images.source if labels is None else f"{images.source} (sha256 {digest})",
        "calibrated on": "these photos" if files is None else f"{len(files)} others (sha256 {digest_files(files)})",
        "type": str(conditions.dtype).removeprefix("torch."),
        "batch": str(conditions.batch_size),
        "timed photos": str(conditions.timed_images),
        "scales": str(conditions.scales),
        **prepare_machine(conditions.device),
        "aptvit": aptvit.__version__,
    }
