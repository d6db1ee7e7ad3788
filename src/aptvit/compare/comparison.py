"""A uniform model and its adaptive form compared on the same images, in one process."""

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
from aptvit.report.page import Comparison, ImageResult
from aptvit.scorers.glance import GlanceScorer, fit_glance

__all__ = ["compare"]


def compare(
    host: Host,
    name: str,
    images: LoadedImages,
    target: Target | None,
    *,
    scorer: str = "entropy",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    batch_size: int = 8,
    rounds: int | None = None,
    labels: Sequence[int] | None = None,
    num_drawings: int = 24,
    command: str | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Run both models over the images: outputs, tokens and FLOPs once, then timed rounds.

    In a round, each batch goes through both models, one right after the other. Time is from normalised images in memory
    to logits, and includes scoring, layout and embedding.

    Args:
        host: The uniform model; with ``adaptive`` its saved adaptive model is compared.
        name: Name of the model, for the report.
        images: The images.
        target: Thresholds, or the share of the tokens; None for those of a saved model.
        scorer: As for `aptvit.adapt`, not for a saved model; ``"glance"`` is fitted on these images.
        dtype: Type that both models compute in.
        device: Device that both models run on.
        batch_size: Images per batch.
        rounds: Timed rounds; by default enough for about 12 batches, at least 1 and at most 5.
        labels: Class index of each image, for accuracies.
        num_drawings: Number of images in the report: first those that the two models answer differently.
        command: Command line that reproduces the comparison.
        progress: Wraps long work.

    Raises:
        ValueError: If the model cannot be adapted or the target cannot be reached.
    """
    environment = prepare_machine(device)
    # The FLOP counter fails on parameters that require gradients in inference mode.
    uniform = host.model.to(device, dtype).requires_grad_(False)
    if host.adaptive is None:
        target = target or Target(keep=0.5)
        model = AdaptivePatchTransformer(uniform, **{"scorer": scorer, **target.options()})
    else:
        model = host.adaptive.to(device, dtype)
        if target is not None:
            _retarget(model, target)
    network_of = host.network_of or (lambda model: model)
    networks: list[Any] = [network_of(side).to(device, dtype).eval() for side in (uniform, model)]
    batches = NormalisedBatches(images.pixels, host.data, batch_size, device)
    if host.adaptive is None and isinstance(model.patchifier.scorer, GlanceScorer):
        fit_glance(model, progress(batches, "fitting the glance", len(batches)))
    if target is not None and target.calibrated:
        calibrate(model, progress(batches, "calibrating", len(batches)), keep=target.keep)
    model.prepare()  # once for all images, so it is not timed
    # The adaptive model casts by itself, after patches are scored in full precision.
    sides: list[Any] = [lambda batch: networks[0](batch.to(dtype)), networks[1]]
    outputs: list[list[Tensor]] = [[], []]
    flops, patches = [0, 0], []
    with torch.inference_mode(), countable_attention(model, device):
        for batch in progress(batches, "running both", len(batches)):  # also the warm-up
            layout = model.layout(batch)
            patches += [layout.patches(i).cpu().numpy() for i in range(len(batch))]
            for i, side in enumerate(sides):
                flops[i] += count_flops(partial(_append_output, outputs[i], side, batch))
    with torch.inference_mode():
        seconds = paired_rounds(sides, batches, rounds or max(1, min(5, 12 // len(batches))), device, progress)
    maps = [torch.cat(side).float().cpu() for side in outputs]
    logits: list[Any] = [side.flatten(1) for side in maps]
    predictions = [side.argmax(1) for side in logits]
    same = predictions[0] == predictions[1]
    has_weights, has_maps = host.weights != "random", host.network_of is not None
    is_classifier = has_weights and model.num_classes > 0  # predictions of random weights are not compared
    classes = torch.tensor(labels) if labels is not None and is_classifier else None
    top1 = [None if classes is None else _mean(side == classes) for side in predictions]
    names = (class_names(uniform) or _numbers(model.num_classes)) if is_classifier else None
    (rows, cols), count, size = layout.grid_sizes[0], len(patches), model.patch_size
    shares = [len(rects) / (rows * cols) for rects in patches]
    correlations = cosine_similarity(*(side - side.mean(1, keepdim=True) for side in logits))  # Pearson's, (N,)
    differing = ~same if is_classifier else -correlations if has_maps else torch.zeros(count)
    drawn = differing.float().argsort(descending=True, stable=True)[:num_drawings].tolist()
    decisions = _decisions(model, NormalisedBatches([images.pixels[i] for i in drawn], host.data, batch_size, device))
    results = [
        ImageResult(
            name=str(images.paths[i]),
            patches=patches[i],
            image=images.pixels[i][:, : rows * size, : cols * size].permute(1, 2, 0).numpy(),
            tokens=len(patches[i]),
            tokens_uniform=rows * cols,
            agrees=bool(same[i]) if is_classifier else None,
            prediction=names[int(predictions[1][i])] if names else None,
            prediction_uniform=names[int(predictions[0][i])] if names else None,
            truth=names[int(classes[i])] if names and classes is not None else None,
            maps=(maps[0][i].numpy(), maps[1][i].numpy()) if has_maps else None,
            correlation=float(correlations[i]) if has_maps else None,
            decisions=reasons,
        )
        for i, reasons in zip(drawn, decisions, strict=True)
    ]
    return Comparison(
        model=name,
        weights=host.weights,
        device=environment["device"],
        dtype=str(dtype).removeprefix("torch."),
        scorer=model.patchifier.scorer_name or scorer,
        budget=_saved_budget(model) if target is None else str(target),
        thresholds=model.thresholds,
        image_size=(rows * size, cols * size),
        patch_size=size,
        batch_size=batch_size,
        images=count,
        keep_ratio=sum(shares) / count,
        keep_spread=(min(shares), max(shares)),
        gflops_uniform=flops[0] / count / 1e9,
        gflops_adaptive=flops[1] / count / 1e9,
        seconds_uniform=tuple(seconds[0]),
        seconds_adaptive=tuple(seconds[1]),
        agreement=_mean(same) if is_classifier else None,
        top1_uniform=top1[0],
        top1_adaptive=top1[1],
        correlation=_mean(correlations) if has_maps else None,
        cosine=_mean(cosine_similarity(*logits)) if has_weights else None,
        results=results,
        skipped=images.skipped,
        environment=environment,
        command=command,
    )


def _retarget(model: AdaptivePatchTransformer, target: Target) -> None:
    """Set the budget of a saved model to a target for the patch sizes that it has."""
    if target.thresholds is not None:
        model.thresholds = target.thresholds
    elif target.per_image:
        model.keep = target.keep


def _saved_budget(model: AdaptivePatchTransformer) -> str:
    if model.keep is not None:
        return f"keep {model.keep:g}, as saved"
    return f"thresholds {', '.join(f'{value:.4g}' for value in model.thresholds or ())}, as saved"


def _numbers(num_classes: int) -> list[str]:
    return [f"class {i}" for i in range(num_classes)]


@torch.inference_mode()
def _decisions(model: AdaptivePatchTransformer, batches: NormalisedBatches) -> list[MergeDecisions]:
    return [merge_decisions(model.patchifier, image) for batch in batches for image in batch]


def _append_output(outputs: list[Tensor], side: Any, images: Tensor) -> None:
    outputs.append(side(images))


def _mean(values: Tensor) -> float:
    return float(values.float().mean())
