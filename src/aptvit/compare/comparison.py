"""A uniform model and its adaptive form side by side, on the same images, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from aptvit.calibration.calibrator import Target, calibrate
from aptvit.files.batches import LoadedImages, NormalisedBatches
from aptvit.hosts.pretrained import Host, class_names
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import paired_rounds
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.explanation import MergeDecisions, merge_decisions
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
    """Run both models over the images: outputs, tokens and FLOPs once, then timed rounds.

    A round takes every batch through both models, one right after the other. Time runs from normalised images in
    memory to logits; scoring, layout and embedding are inside.

    Args:
        host: The uniform model.
        name: Its name, for the report.
        photos: What to run on.
        wish: How many tokens.
        scorer: As for `aptvit.adapt`; ``"glance"`` is fitted on these images.
        dtype: Type that both models compute in.
        device: Where they run.
        batch_size: Images per batch.
        rounds: Timed rounds; by default enough for about 12 batches, at least 1 and at most 5.
        labels: Class of each image, for accuracies.
        num_pictures: Images to show in the report.
        command: Command line that gives this comparison.
        progress: Wraps long work.

    Raises:
        ValueError: If the model cannot be adapted or the wish cannot be met.
    """
    environment = prepare_machine(device)
    # The FLOP counter fails on parameters that want a gradient in inference mode.
    uniform = host.model.to(device, dtype).requires_grad_(False)
    model = AdaptivePatchTransformer(uniform, **{"scorer": scorer, **wish.options()})
    wrap = host.network_of or (lambda model: model)
    networks: list[Any] = [wrap(side).to(device, dtype).eval() for side in (uniform, model)]
    batches = NormalisedBatches(photos.pixels, host.data, batch_size, device)
    if isinstance(model.patchifier.scorer, GlanceScorer):
        fit_glance(model, progress(batches, "fitting the glance", len(batches)))
    if wish.calibrated:
        calibrate(model, progress(batches, "calibrating", len(batches)), keep=wish.keep)
    model.prepare()  # once and for all: no part of an image's cost
    sides: list[Any] = [partial(_run, networks[0], dtype), networks[1]]  # patches are scored in full precision
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    flops, patches = [0, 0], []
    decisions: list[MergeDecisions] = []
    with torch.inference_mode(), countable_attention(model, device):
        for images in progress(batches, "running both", len(batches)):  # also the warm-up
            layout = model.layout(images)
            patches += [layout.patches(i).cpu().numpy() for i in range(len(images))]
            shown = images[: max(0, num_pictures - len(decisions))]
            decisions += [merge_decisions(model.patchifier, image) for image in shown]
            for number, side in enumerate(sides):
                flops[number] += count_flops(partial(_collect, outputs[number], side, images))
    rounds = rounds or max(1, min(5, 12 // len(batches)))
    with torch.inference_mode():
        seconds = paired_rounds(sides, batches, rounds, device, progress)
    maps = [torch.cat(side).float().cpu() for side in outputs]
    logits: list[Any] = [side.flatten(1) for side in maps]
    answers = [side.argmax(1) for side in logits]
    has_weights = host.weights != "random"  # otherwise agreement would mean nothing
    classifies = has_weights and model.num_classes > 0
    truth = torch.tensor(labels) if labels is not None and classifies else None
    right = [None if truth is None else _mean(side == truth) for side in answers]
    words = class_names(uniform, model.num_classes) if classifies else None
    (rows, cols), count, size = layout.grid_sizes[0], len(patches), model.patch_size
    shares = [len(rects) / (rows * cols) for rects in patches]
    correlations = None if host.network_of is None else _correlations(*logits)
    results = [
        PhotoResult(
            name=str(photos.paths[i]),
            patches=patches[i],
            image=photos.pixels[i][:, : rows * size, : cols * size].permute(1, 2, 0).numpy(),
            tokens=len(patches[i]),
            tokens_uniform=rows * cols,
            agrees=bool(answers[0][i] == answers[1][i]) if classifies else None,
            prediction=words[int(answers[1][i])] if words else None,
            maps=None if host.network_of is None else (maps[0][i].numpy(), maps[1][i].numpy()),
            correlation=None if correlations is None else float(correlations[i]),
            decisions=decisions[i],
        )
        for i in range(min(num_pictures, count))
    ]
    return Comparison(
        model=name,
        weights=host.weights,
        device=environment["device"],
        dtype=str(dtype).removeprefix("torch."),
        scorer=model.patchifier.scorer_name or scorer,
        budget=str(wish),
        thresholds=model.thresholds,
        image_size=(rows * size, cols * size),
        patch_size=size,
        batch_size=batch_size,
        num_photos=count,
        keep_ratio=sum(shares) / count,
        keep_spread=(min(shares), max(shares)),
        gflops_uniform=flops[0] / count / 1e9,
        gflops_adaptive=flops[1] / count / 1e9,
        seconds_uniform=tuple(seconds[0]),
        seconds_adaptive=tuple(seconds[1]),
        images=count,
        agreement=_mean(answers[0] == answers[1]) if classifies else None,
        top1_uniform=right[0],
        top1_adaptive=right[1],
        correlation=None if correlations is None else _mean(correlations),
        cosine=_mean(cosine_similarity(*logits)) if has_weights else None,
        photos=results,
        skipped=photos.skipped,
        environment=environment,
        command=command,
    )


def _run(network: Any, dtype: torch.dtype, images: Tensor) -> Tensor:
    return network(images.to(dtype))


def _correlations(uniform: Tensor, adaptive: Tensor) -> Tensor:
    """(N, pixels) maps of both models -> (N,) Pearson's correlation over the pixels of each image."""
    return cosine_similarity(uniform - uniform.mean(1, keepdim=True), adaptive - adaptive.mean(1, keepdim=True))


def _collect(outputs: list[Tensor], side: Any, images: Tensor) -> None:
    outputs.append(side(images))


def _mean(values: Tensor) -> float:
    return float(values.float().mean())
