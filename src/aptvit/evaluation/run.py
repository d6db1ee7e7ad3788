"""An evaluation: every method on the same images in one process, first its outputs, then its time.

images ── uniform logits ──┬── logits of a method ── correct? same top-1? ──────────┐
                           └── timed images, batch by batch: uniform, method ───────┴── a row ── JSON
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import aptvit
from aptvit.datasets.labelled import LabelledImages, find_labelled
from aptvit.evaluation.inputs import HostInputs
from aptvit.evaluation.methods import UNIFORM, Conditions, Method, prepare
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow, pack_bits
from aptvit.evaluation.statistics import agrees, divergences, is_correct
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
            inputs = HostInputs(host if size == sizes[0] else _checked(load(size), name), files, conditions, progress)
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


def _measure(inputs: HostInputs, row: EvaluationRow) -> dict[str, Any]:
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
        "divergences": divergences(logits, reference),
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
