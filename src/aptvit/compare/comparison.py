"""A uniform model and its adaptive form side by side, on the same photos, in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from aptvit.calibration.calibrator import Target, calibrate
from aptvit.data import TokenBudgetBatcher, TokenPack, restore_order
from aptvit.files.batches import LoadedImages, NormalisedBatches
from aptvit.hosts.pretrained import Host, class_names
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.timing import (
    count_flops,
    countable_attention,
    describe_device,
    describe_environment,
    interleaved,
    keep_freed_memory,
)
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.report.page import Comparison, PhotoResult
from aptvit.scorers.glance import GlanceScorer, fit_glance

__all__ = ["compare"]


def compare(
    host: Host,
    name: str,
    photos: LoadedImages,
    wish: Target,
    *,
    scorer: str = "entropy",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch_size: int = 8,
    rounds: int | None = None,
    labels: Sequence[int] | None = None,
    num_pictures: int = 24,
    command: str | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models over the photos: outputs, tokens and FLOPs once, then timed rounds.

    A round takes every batch through both models, one right after the other. Time runs from normalised images in
    memory to logits; scoring, layout and embedding are inside.

    Args:
        host: The uniform model.
        name: Its name, for the report.
        photos: What to run on.
        wish: How many tokens.
        scorer: As for `aptvit.adapt`; ``"glance"`` is fitted on these photos.
        dtype: Type that both models compute in.
        device: Where they run.
        batch_size: Photos per batch.
        rounds: Timed rounds; by default enough for about 12 batches, at least 1 and at most 5.
        labels: Class of each photo, for accuracies.
        num_pictures: Photos to keep for pictures.
        command: Command line that gives this comparison.
        progress: Wraps long work.

    Raises:
        ValueError: If the model cannot be adapted or the wish cannot be met.
    """
    memory_kept = device == "cpu" and keep_freed_memory()
    # The FLOP counter stumbles over parameters that want a gradient where there is none to be had.
    uniform = host.model.to(device, dtype).requires_grad_(False)
    model = AdaptivePatchTransformer(uniform, **{"scorer": scorer, **wish.options()})
    batches = NormalisedBatches(photos.pixels, host.data, batch_size, device)
    if isinstance(model.patchifier.scorer, GlanceScorer):
        fit_glance(model, progress(batches, "teaching the glance", len(batches)))
    if wish.calibrated:
        calibrate(model, progress(batches, "calibrating", len(batches)), keep=wish.keep)
    known = host.weights != "random"  # otherwise agreement would mean nothing
    classifies = known and model.num_classes > 0
    outputs = _outputs(uniform, model, batches, dtype, progress)
    rounds = rounds or max(1, min(5, 12 // len(batches)))
    seconds = _timed_rounds(uniform, model, batches, dtype, rounds, progress)
    answers = [logits.argmax(1) for logits in outputs.logits]
    same = answers[0] == answers[1]
    words = class_names(uniform, model.num_classes) if classifies else None
    per_photo = [len(patches) for patches in outputs.patches]
    grid = outputs.grid_size
    image_size = (grid[0] * model.patch_size, grid[1] * model.patch_size)
    shown = [
        PhotoResult(
            name=str(photos.paths[i]),
            patches=outputs.patches[i],
            picture=photos.pixels[i][:, : image_size[0], : image_size[1]].permute(1, 2, 0).numpy(),
            tokens=per_photo[i],
            tokens_uniform=grid[0] * grid[1],
            agrees=bool(same[i]) if classifies else None,
            prediction=words[int(answers[1][i])] if words else None,
        )
        for i in range(min(num_pictures, len(photos.paths)))
    ]
    truth = torch.tensor(labels) if labels is not None and classifies else None
    return Comparison(
        model=name,
        weights=host.weights,
        device=describe_device(device),
        dtype=str(dtype).removeprefix("torch."),
        scorer=model.patchifier.scorer_name or scorer,
        budget=str(wish),
        thresholds=model.thresholds,
        image_size=image_size,
        patch_size=model.patch_size,
        batch_size=batch_size,
        num_photos=len(photos.paths),
        keep_ratio=sum(per_photo) / (grid[0] * grid[1] * len(per_photo)),
        keep_spread=(min(per_photo) / (grid[0] * grid[1]), max(per_photo) / (grid[0] * grid[1])),
        gflops_uniform=outputs.flops[0] / len(photos.paths) / 1e9,
        gflops_adaptive=outputs.flops[1] / len(photos.paths) / 1e9,
        seconds_uniform=seconds[0],
        seconds_adaptive=seconds[1],
        photos_per_round=len(photos.paths),
        agreement=float(same.float().mean()) if classifies else None,
        top1_uniform=None if truth is None else float((answers[0] == truth).float().mean()),
        top1_adaptive=None if truth is None else float((answers[1] == truth).float().mean()),
        cosine=float(nn.functional.cosine_similarity(*outputs.logits).mean()) if known else None,
        photos=shown,
        skipped=photos.skipped,
        environment=describe_environment(memory_kept),
        command=command,
    )


@dataclass(frozen=True)
class _Outputs:
    logits: tuple[Tensor, Tensor]
    flops: tuple[int, int]
    patches: list[np.ndarray]
    grid_size: tuple[int, int]


@torch.inference_mode()
def _outputs(
    uniform: nn.Module,
    model: AdaptivePatchTransformer,
    batches: NormalisedBatches,
    dtype: torch.dtype,
    progress: Progress,
) -> _Outputs:
    """Logits, FLOPs and patches of both models; also their warm-up."""
    expected: list[Tensor] = []
    got: list[tuple[list[int], Tensor]] = []
    flops, patches = [0, 0], {}

    def run_uniform(images: Tensor) -> None:
        expected.append(uniform(images.to(dtype)))

    def run_adaptive(pack: TokenPack) -> None:
        got.append((pack.index, model(pack.images, layout=pack.layout)))

    first = next(iter(batches))
    model.prepare()  # once and for all: no part of an image's cost
    for images in progress(batches, "running uniform", len(batches)):
        flops[0] += count_flops(partial(run_uniform, images))
    # As many tokens at a time as the uniform model had, however many images that is.
    layout = model.layout(first[:1])
    uniform_tokens = math.prod(layout.grid_sizes[0]) + layout.num_prefix_tokens
    packs = TokenBudgetBatcher(
        model, progress(batches, "running adaptive", len(batches)), batches.batch_size * uniform_tokens
    )
    with countable_attention(model, batches.device):
        for pack in packs:
            flops[1] += count_flops(partial(run_adaptive, pack))
            patches.update({number: pack.layout.patches(i).cpu().numpy() for i, number in enumerate(pack.index)})
    logits = (torch.cat(expected), restore_order(got))
    return _Outputs(
        (logits[0].float().flatten(1).cpu(), logits[1].float().flatten(1).cpu()),
        (flops[0], flops[1]),
        [patches[number] for number in sorted(patches)],
        layout.grid_sizes[0],
    )


@torch.inference_mode()
def _timed_rounds(
    uniform: nn.Module,
    model: AdaptivePatchTransformer,
    batches: NormalisedBatches,
    dtype: torch.dtype,
    rounds: int,
    progress: Progress,
) -> tuple[list[float], list[float]]:
    """Seconds of each round, uniform and adaptive; who goes first alternates."""
    seconds: tuple[list[float], list[float]] = ([], [])
    runs = (lambda x: uniform(x.to(dtype)), model)
    for step in progress(range(rounds), "timing", rounds):
        total = [0.0, 0.0]
        for number, images in enumerate(batches):
            once = interleaved([partial(run, images) for run in runs], 1, batches.device, first=step + number)
            total = [before + seconds[0] for before, seconds in zip(total, once, strict=True)]
        for kept, one in zip(seconds, total, strict=True):
            kept.append(one)
    return seconds
