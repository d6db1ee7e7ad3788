"""One case of a benchmark: both sides built, counted and timed, for inference or for training."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.benchmark.record import Case, Memory, Row
from aptvit.calibration.calibrator import calibrate
from aptvit.files.batches import NormalisedBatches, read_images
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.measuring.timing import count_flops, countable_attention, interleaved, peak_memory
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.layout import PatchLayout

__all__ = ["Subject", "load_subject", "measure_case"]

_Ways = dict[str, Callable[[Tensor], Any]]  # how a side runs a batch, by backend


@dataclass(frozen=True)
class Subject:
    """A host with the photos that it reads.

    Attributes:
        host: The uniform model.
        data: timm's data configuration of it.
        read: Gives (C, H, W) uint8 for each of the first photos, all if None, for an input of that side.
    """

    host: nn.Module
    data: dict[str, Any]
    read: Callable[[int | None, int | None], list[Tensor]]

    def batches(self, case: Case, size: int | None = None) -> list[Tensor]:
        """Full normalised batches on the device, of the case's own size or of another."""
        pixels = self.read(case.max_photos, size)
        count = max(1, len(pixels) // case.batch) * case.batch
        filled = [pixels[i % len(pixels)] for i in range(count)]
        return list(NormalisedBatches(filled, self.data, case.batch, case.device))


def load_subject(paths: tuple[Path, ...], model: str, size: int | None) -> Subject:
    """A host with random weights, and its photos.

    Args:
        paths: Image files.
        model: timm's name.
        size: Side of the input in pixels; the model's own if None.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {} if size is None else {"img_size": size}
    host = timm.create_model(model, **options).eval()
    data = timm.data.resolve_model_data_config(host)
    if size is not None:
        data["input_size"] = (data["input_size"][0], size, size)

    @lru_cache(maxsize=2)  # the size of the cases, and the one that thresholds are from
    def read(max_photos: int | None, side: int | None) -> list[Tensor]:
        other = {} if side is None else {"input_size": (data["input_size"][0], side, side)}
        return read_images(paths[:max_photos], {**data, **other}).pixels

    return Subject(host, data, read)


def measure_case(case: Case, load: Callable[[str, int | None], Subject], rounds: int) -> Row:
    """Measure one case; a failure becomes a row with an error.

    Args:
        case: What to measure.
        load: Gives the subject for a model and a size.
        rounds: Timed rounds.
    """
    try:
        subject = load(case.model, case.size)
        batches = subject.batches(case)
        measured = (_infer if case.mode == "infer" else _train)(case, subject, batches, rounds)
        images = len(batches) * case.batch
        photos = min(images, len(subject.read(case.max_photos, None)))
        size = (batches[0].shape[2], batches[0].shape[3])
        return Row(case, image_size=size, photos=photos, images=images, **measured)
    except Exception as error:  # out of memory has many names; whatever it is, the other cases go on
        lines = str(error).strip().splitlines() or [""]
        return Row(case, error=f"{type(error).__name__}: {lines[0]}")
    finally:
        gc.collect()
        if case.device.startswith("cuda"):
            torch.cuda.empty_cache()


@torch.inference_mode()
def _infer(case: Case, subject: Subject, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time from normalised images in memory to logits."""
    dtype = getattr(torch, case.dtype)
    # The FLOP counter stumbles over parameters that want a gradient where there is none to be had.
    host = subject.host.eval().to(case.device, dtype).requires_grad_(False)
    model = AdaptivePatchTransformer(host, scales=case.scales)
    _set_thresholds(case, model, subject, batches)
    uniform: _Ways = {"eager": lambda images: host(images.to(dtype))}
    adaptive: _Ways = {"eager": model}
    model(batches[0][:1])  # composes the weights of coarse patches once and for all: no part of an image's cost
    flops = _flops(case, model, uniform["eager"], model, batches)
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
    layouts = [model.layout(images) for images in batches]
    timed = _timed(case, uniform, adaptive, batches, rounds)
    memory = _memory(case, _sides(case, timed, uniform, adaptive), batches, [_bytes(host), _bytes(model)])
    found = {
        **flops,
        **timed,
        **_kept(model, layouts),
        **_front(case, model, batches, layouts, rounds),
        "memory": memory,
    }
    return found if case.keep < 1 else {**found, **_outside(case, host, batches, rounds)}


def _train(case: Case, subject: Subject, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Time and memory of forward, loss, backward and an AdamW step; each side has weights of its own."""

    def own_host() -> nn.Module:
        return copy.deepcopy(subject.host).to(case.device, torch.float32).requires_grad_(True).train()

    def own_model(thresholds: tuple[float, ...] | None) -> AdaptivePatchTransformer:
        model = AdaptivePatchTransformer(own_host(), thresholds=thresholds, scales=case.scales)
        return model.train()

    model = own_model(None)
    _set_thresholds(case, model, subject, batches)
    uniform, adaptive = {"eager": _Trainee(own_host(), case)}, {"eager": _Trainee(model, case)}
    flops = _flops(case, model, uniform["eager"], adaptive["eager"], batches)
    if case.compiled:
        torch.compiler.reset()
        fast_model = own_model(model.thresholds)
        fast_model.compile()
        uniform["compile"] = _Trainee(own_host(), case, compiled=True)
        adaptive["compile"] = _Trainee(fast_model, case)
    with torch.no_grad():
        kept = _kept(model, [model.layout(images) for images in batches])
    timed = _timed(case, dict(uniform), dict(adaptive), batches, rounds)
    sides = _sides(case, timed, uniform, adaptive)
    resident = [_bytes(side.model, side.optimizer) for side in sides]
    return {**flops, **timed, **kept, "memory": _memory(case, sides, batches, resident)}


class _Trainee:
    """A model that takes training steps, with an optimizer of its own."""

    def __init__(self, model: nn.Module, case: Case, compiled: bool = False) -> None:
        self.model = model
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        classes = model.num_classes or model.num_features  # a feature model's features serve as logits
        assert isinstance(classes, int)
        self.labels = torch.randint(classes, (case.batch,), device=case.device)
        self.autocast = partial(
            torch.autocast,
            torch.device(case.device).type,
            dtype=getattr(torch, case.dtype),
            enabled=case.dtype != "float32",
        )

    def __call__(self, images: Tensor) -> None:
        with self.autocast():
            loss = F.cross_entropy(self.run(images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# What is measured of a case


def _set_thresholds(case: Case, model: AdaptivePatchTransformer, subject: Subject, batches: list[Tensor]) -> None:
    if case.keep == 1:
        model.thresholds = (0.0,) * (case.scales - 1)  # no entropy is below 0: everything is scored, nothing merged
        return
    if case.thresholds_from is not None:
        batches = subject.batches(case, case.thresholds_from)
    calibrate(model, batches, keep=case.keep)


def _flops(
    case: Case,
    model: AdaptivePatchTransformer,
    uniform: Callable[[Tensor], Any],
    adaptive: Callable[[Tensor], Any],
    batches: list[Tensor],
) -> dict[str, Any]:
    """Per image. All batches of the uniform side are alike, those of the adaptive side are not."""
    model.prepare()  # once and for all: no part of an image's cost
    with countable_attention(model, case.device):
        total = sum(count_flops(partial(adaptive, images)) for images in batches)
    return {
        "gflops_uniform": count_flops(partial(uniform, batches[0])) / case.batch / 1e9,
        "gflops_adaptive": total / (len(batches) * case.batch) / 1e9,
    }


def _kept(model: AdaptivePatchTransformer, layouts: list[PatchLayout]) -> dict[str, Any]:
    """Shares of the patch tokens, image by image."""
    shares = []
    for layout in layouts:
        for length, (rows, cols) in zip(layout.seqlens, layout.grid_sizes, strict=True):
            shares.append((length - layout.num_prefix_tokens) / (rows * cols))
    return {
        "thresholds": model.thresholds,
        "keep_mean": statistics.fmean(shares),
        "keep_least": min(shares),
        "keep_most": max(shares),
    }


def _timed(case: Case, uniform: _Ways, adaptive: _Ways, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """Seconds of the fastest way of each side, by the median."""
    ways = [*uniform.values(), *adaptive.values()]
    # Counting the operations has warmed an eager CPU already.
    if case.compiled or torch.device(case.device).type != "cpu":
        for way in ways:
            for images in batches:
                way(images)
    seconds = _rounds(ways, batches, rounds, case.device)
    of_uniform = dict(zip(uniform, seconds[: len(uniform)], strict=True))
    of_adaptive = dict(zip(adaptive, seconds[len(uniform) :], strict=True))
    best = [min(of, key=lambda name: statistics.median(of[name])) for of in (of_uniform, of_adaptive)]
    return {
        "seconds_uniform": tuple(of_uniform[best[0]]),
        "seconds_adaptive": tuple(of_adaptive[best[1]]),
        "backend_uniform": best[0],
        "backend_adaptive": best[1],
    }


def _sides(case: Case, timed: dict[str, Any], uniform: Mapping[str, Any], adaptive: Mapping[str, Any]) -> list[Any]:
    """The way of each side whose memory is told: the fastest, but on the CPU the eager one."""
    if torch.device(case.device).type == "cpu":  # counted operator by operator, which compiled code does not show
        return [uniform["eager"], adaptive["eager"]]
    return [uniform[timed["backend_uniform"]], adaptive[timed["backend_adaptive"]]]


def _memory(
    case: Case, sides: Sequence[Callable[[Tensor], Any]], batches: list[Tensor], resident: Sequence[int]
) -> Memory:
    """Of both sides, for the batch that needs most."""
    peaks = [max(peak_memory(partial(side, images), case.device) for images in batches) for side in sides]
    return Memory(*peaks, *resident)


def _bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Weights, buffers and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    if optimizer is not None:
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _front(
    case: Case, model: AdaptivePatchTransformer, batches: list[Tensor], layouts: list[PatchLayout], rounds: int
) -> dict[str, Any]:
    """What comes before the blocks, timed alone: milliseconds per batch."""

    def lay_out(batch: tuple[Tensor, PatchLayout]) -> None:
        model.layout(batch[0])

    def embed(batch: tuple[Tensor, PatchLayout]) -> None:
        model.embed(*batch)

    both = list(zip(batches, layouts, strict=True))
    for way in (lay_out, embed):
        way(both[0])
    layout_ms, embed_ms = (
        1000 * statistics.median(one) / len(both) for one in _rounds((lay_out, embed), both, rounds, case.device)
    )
    return {"layout_ms": layout_ms, "embed_ms": embed_ms}


def _outside(case: Case, host: Any, batches: list[Tensor], rounds: int) -> dict[str, Any]:
    """All sides without their blocks, nothing merged: milliseconds per batch, from many short rounds."""
    blocks, host.blocks = host.blocks, nn.Sequential()
    try:
        ways: dict[str, Callable[[Tensor], Any]] = {
            "uniform": lambda images: host(images.to(getattr(torch, case.dtype))),
            "adaptive": AdaptivePatchTransformer(host, thresholds=(0.0,) * (case.scales - 1)),
            "unscored": AdaptivePatchTransformer(host, scales=case.scales),
        }
        for way in ways.values():
            way(batches[0])
        seconds = _rounds(list(ways.values()), batches, 10 * rounds, case.device)
    finally:
        host.blocks = blocks
    return {
        f"outside_ms_{name}": 1000 * statistics.median(one) / len(batches)
        for name, one in zip(ways, seconds, strict=True)
    }


def _rounds(
    ways: Sequence[Callable[[Any], Any]], batches: Sequence[Any], rounds: int, device: str
) -> list[list[float]]:
    """Seconds of each round, all batches, for each way: a batch goes through all of them before the next."""
    seconds: list[list[float]] = [[] for _ in ways]
    for step in range(rounds):
        totals = [0.0] * len(ways)
        for number, batch in enumerate(batches):
            once = interleaved([partial(way, batch) for way in ways], 1, device, first=step + number)
            totals = [total + one[0] for total, one in zip(totals, once, strict=True)]
        for kept, total in zip(seconds, totals, strict=True):
            kept.append(total)
    return seconds
