"""A benchmark: cases are measured one after the other, for inference or for training, and written to a record."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aptvit
from aptvit.api import adapt, adaptivity_of, load_any
from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Case, Memory, check_cases
from aptvit.calibration.calibrator import calibrate
from aptvit.files.batches import NormalisedBatches, read_images
from aptvit.files.images import open_image, read_each
from aptvit.hosts.pretrained import Host
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.layers.kernels.attention_flash import available_backends
from aptvit.measuring.machine import digest_files, prepare_machine
from aptvit.measuring.memory import peak_memory, storage_bytes
from aptvit.measuring.operations import mean_gflops
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import paired_rounds
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.storage.locking import only_writer

__all__ = ["BenchmarkHost", "measure_case", "run_benchmark"]

_Runs = dict[str, Any]  # functions of a batch, by backend


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
        raise ValueError("there are no images to measure on: give at least one")
    readable, skipped = read_each(images, partial(open_image, max_side=64))
    paths = tuple(path for path, _ in readable)
    with only_writer(output):
        record = BenchmarkRecord.resume(output, _environment(cases[0].device, paths), command, fresh)
        record.skipped = skipped
        # Cases of one model and size are consecutive: one host at a time is in memory.
        load = lru_cache(maxsize=1)(partial(BenchmarkHost, paths))
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


class BenchmarkHost:
    """A host and its input images. Models of timm have random weights.

    Args:
        paths: Image files.
        model: timm's name of the host; or a folder, or name on the hub, as for `aptvit.api.load_any`.
        size: Side of the input in pixels; the model's own if None.
    """

    def __init__(self, paths: tuple[Path, ...], model: str, size: int | None) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {} if size is None else {"img_size": size}
        is_of_timm = "/" not in model and not Path(model).is_dir()
        if not is_of_timm and size is not None:
            raise ValueError(f"{model} is a saved model with its own size: leave out --sizes")
        self.loaded = _random_host(model, options) if is_of_timm else load_any(model)
        self.paths, self.host = paths, self.loaded.model.eval()
        self.read = lru_cache(maxsize=2)(self._read)  # the size of the cases, and that of calibration

    def _read(self, count: int | None, side: int | None) -> list[Tensor]:
        return read_images(self.paths[:count], self.loaded.data, side=side, transform=self.loaded.read).pixels

    def batches(self, case: Case, side: int | None) -> list[Tensor]:
        """Full normalised batches on the device of a case, of images with this side in pixels."""
        pixels = self.read(case.max_photos, side)
        count = max(1, len(pixels) // case.batch) * case.batch
        return list(NormalisedBatches(list(islice(cycle(pixels), count)), self.loaded.data, case.batch, case.device))


def _random_host(name: str, options: dict[str, Any]) -> Host:
    model = timm.create_model(name, **options)
    return Host(model, "random", timm.data.resolve_model_data_config(model))


def measure_case(row: BenchmarkRow, load: Callable[[str, int | None], BenchmarkHost], rounds: int) -> dict[str, Any]:
    """Measure the case of a row.

    Args:
        row: A row with only its case.
        load: (timm's name, side of the input) -> host.
        rounds: Timed rounds.

    Returns:
        The other fields of the row.
    """
    case = row.case
    source = load(case.model, case.size)
    batches = source.batches(case, case.size)
    images = sum(map(len, batches))
    return {
        "image_size": tuple(batches[0].shape[2:]),
        "photos": min(images, len(source.read(case.max_photos, case.size))),
        "images": images,
        **(_infer if case.mode == "infer" else _train)(case, source, batches, rounds),
    }


@torch.inference_mode()
def _infer(case: Case, source: BenchmarkHost, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time from normalised images in memory to the output of the model."""
    dtype = getattr(torch, case.dtype)
    # The FLOP counter fails on parameters that require gradients in inference mode.
    host = source.host.eval().to(case.device, dtype).requires_grad_(False)
    model = adapt(host, scales=case.scales)
    settings = adaptivity_of(model)
    _set_thresholds(case, model, source, batches)
    runs: _Runs = {"eager": host}
    adaptive: _Runs = {"eager": model}
    if case.compiled:
        torch.compiler.reset()  # graphs of earlier cases would count for the limit of recompilations
        runs["compile"] = torch.compile(host)
        adaptive["compile"] = adapt(host, thresholds=settings.thresholds)
        adaptivity_of(adaptive["compile"]).compile()
    if case.graphs:
        if settings is not model:
            raise ValueError(f"{case.model}: CUDA graphs are for bare towers; leave out --graphs")
        runs["graphs"] = partial(BlockGraphs(), "uniform", host)
        adaptive["graphs"] = AdaptivePatchTransformer(host, thresholds=model.thresholds)
        adaptive["graphs"].use_cuda_graphs()
    run_on = source.loaded.run
    uniform = {backend: lambda images, run=run: run_on(run, images.to(dtype)) for backend, run in runs.items()}
    adaptive = {backend: partial(run_on, run) for backend, run in adaptive.items()}
    result, peaks = _compare(case, settings, uniform, adaptive, batches, rounds)
    resident = [storage_bytes([*side.parameters(), *side.buffers()]) for side in (host, model)]
    pairs = [(images, settings.layout(images)) for images in batches]
    front: _Runs = {"layout_ms": lambda pair: settings.layout(pair[0])}
    if settings is model:
        front["embed_ms"] = lambda pair: model.embed(*pair)
    result |= {"memory": Memory(*peaks, *resident), **_milliseconds(front, pairs, rounds, case.device)}
    is_tower = case.keep == 1 and hasattr(host, "blocks")
    return result | _outside_blocks(case, host, batches, rounds) if is_tower else result


def _train(case: Case, source: BenchmarkHost, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time and memory of forward, loss, backward and an AdamW step. Each model and backend has weights of its own."""

    def new_host() -> nn.Module:
        return copy.deepcopy(source.host).to(case.device, torch.float32).requires_grad_(True).train()

    if source.loaded.library != "timm":
        raise ValueError(f"{case.model}: training is measured with models of timm; leave out --training")
    model = AdaptivePatchTransformer(new_host(), scales=case.scales).train()
    _set_thresholds(case, model, source, batches)
    uniform: _Runs = {"eager": _TrainingStep(new_host(), case)}
    adaptive: _Runs = {"eager": _TrainingStep(model, case)}
    if case.compiled:
        torch.compiler.reset()
        compiled = AdaptivePatchTransformer(new_host(), thresholds=model.thresholds, scales=case.scales).train()
        compiled.compile()
        uniform["compile"] = _TrainingStep(new_host(), case, compiled=True)
        adaptive["compile"] = _TrainingStep(compiled, case)
    result, peaks = _compare(case, model, uniform, adaptive, batches, rounds)
    resident = [storage_bytes(side["eager"].tensors()) for side in (uniform, adaptive)]
    return result | {"memory": Memory(*peaks, *resident)}


class _TrainingStep:
    """A training step of a model, with its optimizer."""

    def __init__(self, model: nn.Module, case: Case, compiled: bool = False) -> None:
        self.model = model
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        classes: Any = model.num_classes or model.num_features  # features of a model without classifier are its logits
        self.labels = torch.randint(classes, (case.batch,), device=case.device)
        dtype, device = getattr(torch, case.dtype), torch.device(case.device).type
        self.autocast = partial(torch.autocast, device, dtype=dtype, enabled=case.dtype != "float32")

    def __call__(self, images: Tensor) -> None:
        with self.autocast():
            loss = F.cross_entropy(self.run(images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """Weights, buffers and optimizer state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *states]


def _set_thresholds(case: Case, model: Any, source: BenchmarkHost, batches: list[Tensor]) -> None:
    if case.keep == 1:
        # No entropy is below 0: everything is scored, nothing merged.
        adaptivity_of(model).thresholds = (0.0,) * (case.scales - 1)
        return
    if case.thresholds_from is not None:
        batches = source.batches(case, case.thresholds_from)
    calibrate(model, batches, keep=case.keep)


def _compare(
    case: Case, settings: Any, uniform: _Runs, adaptive: _Runs, batches: list[Tensor], rounds: int
) -> tuple[dict[str, Any], list[int]]:
    """Tokens, operations per image, and seconds of the fastest backend of each model; and peaks of memory in bytes."""
    settings.prepare()  # once for all images, so it is not timed
    shares = []
    with torch.no_grad():
        for layout in map(settings.layout, batches):
            sizes = zip(layout.seqlens, layout.grid_sizes, strict=True)
            shares += [(length - layout.num_prefix_tokens) / (rows * cols) for length, (rows, cols) in sizes]
    result: dict[str, Any] = {
        "thresholds": settings.thresholds,
        "keep_mean": statistics.fmean(shares),
        "keep_least": min(shares),
        "keep_most": max(shares),
        "gflops_uniform": mean_gflops(None, uniform["eager"], batches[:1], case.device),  # equal for all batches
        "gflops_adaptive": mean_gflops(settings, adaptive["eager"], batches, case.device),
    }
    runs = [*uniform.values(), *adaptive.values()]
    on_cpu = torch.device(case.device).type == "cpu"
    warmup = int(case.compiled or not on_cpu)  # an eager CPU is warm after the operations are counted
    seconds, peaks = iter(paired_rounds(runs, batches, rounds, case.device, warmup=warmup)), []
    for name, side in (("uniform", uniform), ("adaptive", adaptive)):
        times = {backend: next(seconds) for backend in side}
        best = min(times, key=lambda backend: statistics.median(times[backend]))
        result |= {f"seconds_{name}": tuple(times[best]), f"backend_{name}": best}
        # On the CPU, memory is counted operator by operator, which needs eager code.
        run = side["eager" if on_cpu else best]
        peaks.append(max(peak_memory(partial(run, images), case.device) for images in batches))
    return result, peaks


def _outside_blocks(case: Case, host: Any, batches: list[Tensor], rounds: int) -> dict[str, float]:
    """All models without their blocks, nothing merged: milliseconds per batch, from many short rounds."""
    blocks, host.blocks = host.blocks, nn.Sequential()
    try:
        runs: _Runs = {
            "outside_ms_uniform": lambda images: host(images.to(getattr(torch, case.dtype))),
            "outside_ms_adaptive": AdaptivePatchTransformer(host, thresholds=(0.0,) * (case.scales - 1)),
            "outside_ms_unscored": AdaptivePatchTransformer(host, scales=case.scales),
        }
        return _milliseconds(runs, batches, 10 * rounds, case.device)
    finally:
        host.blocks = blocks


def _milliseconds(runs: _Runs, batches: list[Any], rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds per batch, by name."""
    seconds = paired_rounds(list(runs.values()), batches, rounds, device, warmup=1)
    return {name: 1000 * statistics.median(times) / len(batches) for name, times in zip(runs, seconds, strict=True)}
