"""One case of a benchmark: both sides built, counted and timed, for inference or for training."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.benchmark.record import BenchmarkRow, Case, Memory
from aptvit.calibration.calibrator import calibrate
from aptvit.files.batches import NormalisedBatches, read_images
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.measuring.memory import peak_memory, storage_bytes
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.measuring.rounds import paired_rounds
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["Subject", "measure_case"]

_Runs = dict[str, Callable[[Tensor], Any]]  # how a side runs a batch, by backend


class Subject:
    """A host with random weights, and the images that it reads.

    Args:
        paths: Image files.
        model: timm's name.
        size: Side of the input in pixels; the model's own if None.
    """

    def __init__(self, paths: tuple[Path, ...], model: str, size: int | None) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {} if size is None else {"img_size": size}
        self.host = timm.create_model(model, **options).eval()
        self.data = timm.data.resolve_model_data_config(self.host)
        # The size of the cases, and the one that thresholds are from.
        self.read = lru_cache(maxsize=2)(partial(self._read, paths))

    def _read(self, paths: tuple[Path, ...], max_photos: int | None, side: int | None) -> list[Tensor]:
        size = {} if side is None else {"input_size": (self.data["input_size"][0], side, side)}
        return read_images(paths[:max_photos], {**self.data, **size}).pixels

    def batches(self, case: Case, side: int | None) -> list[Tensor]:
        """Full normalised batches on the device, of images of that side in pixels."""
        pixels = self.read(case.max_photos, side)
        count = max(1, len(pixels) // case.batch) * case.batch
        filled = [pixels[i % len(pixels)] for i in range(count)]
        return list(NormalisedBatches(filled, self.data, case.batch, case.device))


def measure_case(row: BenchmarkRow, load: Callable[[str, int | None], Subject], rounds: int) -> dict[str, Any]:
    """Measure the case of a row.

    Args:
        row: Its case alone.
        load: Gives the subject for a model and a size.
        rounds: Timed rounds.

    Returns:
        The other fields of the row.
    """
    case = row.case
    subject = load(case.model, case.size)
    batches = subject.batches(case, case.size)
    images = len(batches) * case.batch
    return {
        "image_size": tuple(batches[0].shape[2:]),
        "photos": min(images, len(subject.read(case.max_photos, case.size))),
        "images": images,
        **(_infer if case.mode == "infer" else _train)(case, subject, batches, rounds),
    }


@torch.inference_mode()
def _infer(case: Case, subject: Subject, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time from normalised images in memory to logits."""
    dtype = getattr(torch, case.dtype)
    # The FLOP counter fails on parameters that want a gradient in inference mode.
    host = subject.host.eval().to(case.device, dtype).requires_grad_(False)
    model = AdaptivePatchTransformer(host, scales=case.scales)
    _set_thresholds(case, model, subject, batches)
    uniform: _Runs = {"eager": lambda images: host(images.to(dtype))}
    adaptive: _Runs = {"eager": model}
    if case.compiled:
        torch.compiler.reset()  # graphs of earlier cases would count against the limit of recompilations
        fast_host = torch.compile(host)
        fast_model = AdaptivePatchTransformer(host, thresholds=model.thresholds)
        fast_model.compile()
        uniform["compile"] = lambda images: fast_host(images.to(dtype))
        adaptive["compile"] = fast_model
    if case.graphs:
        recorded = BlockGraphs()
        launched_at_once = AdaptivePatchTransformer(host, thresholds=model.thresholds)
        launched_at_once.use_cuda_graphs()
        uniform["graphs"] = lambda images: recorded("uniform", host, images.to(dtype))
        adaptive["graphs"] = launched_at_once
    result, peaks = _compared(case, model, uniform, adaptive, batches, rounds)
    resident = [storage_bytes([*side.parameters(), *side.buffers()]) for side in (host, model)]
    result |= {"memory": Memory(*peaks, *resident), **_front(case, model, batches, rounds)}
    return result if case.keep < 1 else result | _outside(case, host, batches, rounds)


def _train(case: Case, subject: Subject, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time and memory of forward, loss, backward and an AdamW step; each side has weights of its own."""

    def new_host() -> nn.Module:
        return copy.deepcopy(subject.host).to(case.device, torch.float32).requires_grad_(True).train()

    model = AdaptivePatchTransformer(new_host(), scales=case.scales).train()
    _set_thresholds(case, model, subject, batches)
    eager = [_Trainee(new_host(), case), _Trainee(model, case)]
    uniform: _Runs = {"eager": eager[0]}
    adaptive: _Runs = {"eager": eager[1]}
    if case.compiled:
        torch.compiler.reset()
        fast_model = AdaptivePatchTransformer(new_host(), thresholds=model.thresholds, scales=case.scales).train()
        fast_model.compile()
        uniform["compile"] = _Trainee(new_host(), case, compiled=True)
        adaptive["compile"] = _Trainee(fast_model, case)
    result, peaks = _compared(case, model, uniform, adaptive, batches, rounds)
    return result | {"memory": Memory(*peaks, *(storage_bytes(side.tensors()) for side in eager))}


class _Trainee:
    """A model that takes training steps, with an optimizer."""

    def __init__(self, model: nn.Module, case: Case, compiled: bool = False) -> None:
        self.model = model
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        classes: Any = model.num_classes or model.num_features  # a feature model's features serve as logits
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


# Parts of a result


def _set_thresholds(case: Case, model: AdaptivePatchTransformer, subject: Subject, batches: list[Tensor]) -> None:
    if case.keep == 1:
        model.thresholds = (0.0,) * (case.scales - 1)  # no entropy is below 0: everything is scored, nothing merged
        return
    if case.thresholds_from is not None:
        batches = subject.batches(case, case.thresholds_from)
    calibrate(model, batches, keep=case.keep)


def _compared(
    case: Case, model: AdaptivePatchTransformer, uniform: _Runs, adaptive: _Runs, batches: list[Tensor], rounds: int
) -> tuple[dict[str, Any], list[int]]:
    """Tokens, operations per image, seconds of the fastest run of each side by the median; and peaks of memory."""
    model.prepare()  # composes the weights of coarse patches once and for all: no part of an image's cost
    result: dict[str, Any] = _tokens(model, batches)
    with countable_attention(model, case.device):
        flops = sum(count_flops(partial(adaptive["eager"], images)) for images in batches)
    result["gflops_adaptive"] = flops / (len(batches) * case.batch) / 1e9
    # All batches of the uniform side are alike.
    result["gflops_uniform"] = count_flops(partial(uniform["eager"], batches[0])) / case.batch / 1e9
    runs = [*uniform.values(), *adaptive.values()]
    on_cpu = torch.device(case.device).type == "cpu"
    if case.compiled or not on_cpu:  # counting the operations has warmed an eager CPU already
        for run in runs:
            for images in batches:
                run(images)
    seconds, peaks = iter(paired_rounds(runs, batches, rounds, case.device)), []
    for name, side in (("uniform", uniform), ("adaptive", adaptive)):
        times = {backend: next(seconds) for backend in side}
        best = min(times, key=lambda backend: statistics.median(times[backend]))
        result |= {f"seconds_{name}": tuple(times[best]), f"backend_{name}": best}
        # On the CPU memory is counted operator by operator, which compiled code does not show.
        run = side["eager" if on_cpu else best]
        peaks.append(max(peak_memory(partial(run, images), case.device) for images in batches))
    return result, peaks


@torch.no_grad()
def _tokens(model: AdaptivePatchTransformer, batches: list[Tensor]) -> dict[str, Any]:
    """Shares of the patch tokens, image by image."""
    shares = []
    for layout in map(model.layout, batches):
        for length, (rows, cols) in zip(layout.seqlens, layout.grid_sizes, strict=True):
            shares.append((length - layout.num_prefix_tokens) / (rows * cols))
    kept = {"keep_mean": statistics.fmean(shares), "keep_least": min(shares), "keep_most": max(shares)}
    return {"thresholds": model.thresholds, **kept}


def _front(case: Case, model: AdaptivePatchTransformer, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """What comes before the blocks, timed alone: milliseconds per batch."""
    pairs = [(images, model.layout(images)) for images in batches]
    runs = {"layout_ms": lambda pair: model.layout(pair[0]), "embed_ms": lambda pair: model.embed(*pair)}
    return _milliseconds(runs, pairs, rounds, case.device)


def _outside(case: Case, host: Any, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """All sides without their blocks, nothing merged: milliseconds per batch, from many short rounds."""
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


def _milliseconds(
    runs: dict[str, Callable[[Any], Any]], batches: list[Any], rounds: int, device: str
) -> dict[str, float]:
    """Medians per batch, by name."""
    for run in runs.values():
        run(batches[0])
    seconds = paired_rounds(list(runs.values()), batches, rounds, device)
    return {name: 1000 * statistics.median(times) / len(batches) for name, times in zip(runs, seconds, strict=True)}
