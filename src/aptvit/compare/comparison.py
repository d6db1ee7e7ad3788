"""A uniform model and its adaptive form compared on the same images, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from aptvit.api import adapt, adaptivity_of
from aptvit.calibration.calibrator import Target, calibrate
from aptvit.files.batches import LoadedImages, NormalisedBatches
from aptvit.hosts.pretrained import Host, class_names, num_classes_of
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.operations import count_flops, countable_attention
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import paired_rounds
from aptvit.patching.explanation import MergeDecisions, merge_decisions
from aptvit.report.answers import AnswerDrawings, ImageAnswer, answers_of, drawings_of
from aptvit.report.page import Comparison, ImageResult
from aptvit.scorers.glance import GlanceScorer, fit_glance

__all__ = ["compare"]

_Side = Callable[[Tensor], Any]  # a model on a normalised batch


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
    to the output of the model, and includes scoring, layout and embedding.

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
    batches = NormalisedBatches(images.pixels, host.data, batch_size, device)
    model, budget = _adaptive_model(host, uniform, target, scorer, batches, progress)
    settings = adaptivity_of(model)
    network_of = host.network_of or (lambda model: model)
    networks: list[Any] = [network_of(side).to(device, dtype).eval() for side in (uniform, model)]
    settings.prepare()  # once for all images, so it is not timed
    # The adaptive model casts by itself, after patches are scored in full precision.
    sides: list[_Side] = [lambda batch: host.run(networks[0], batch.to(dtype)), partial(host.run, networks[1])]
    with torch.inference_mode(), countable_attention(settings, device):
        measured, flops = _run_both(sides, settings, progress(batches, "running both", len(batches)))  # and warm up
    with torch.inference_mode():
        seconds = paired_rounds(sides, batches, rounds or max(1, min(5, 12 // len(batches))), device, progress)
    has_weights, num_classes, patch_size = host.weights != "random", num_classes_of(uniform), settings.patch_size
    # Predictions of random weights are not compared.
    names = (class_names(uniform) or [f"class {i}" for i in range(num_classes)]) if has_weights else []
    is_classifier = bool(num_classes and names)
    classes = list(labels) if labels is not None and is_classifier else None
    order = sorted(range(len(measured)), key=lambda i: measured[i].is_same_class if is_classifier else measured[i].rank)
    drawn = order[:num_drawings]
    is_drawn = measured[0].likeness_of is not None
    one_by_one = NormalisedBatches([images.pixels[i] for i in drawn], host.data, 1, device)
    results = [
        ImageResult(
            name=str(images.paths[i]),
            patches=measured[i].patches,
            image=measured[i].whole_patches(images.pixels[i], patch_size),
            tokens=len(measured[i].patches),
            tokens_uniform=measured[i].num_cells,
            agrees=measured[i].is_same_class if is_classifier else None,
            prediction=names[measured[i].classes[1]] if is_classifier else None,
            prediction_uniform=names[measured[i].classes[0]] if is_classifier else None,
            truth=None if classes is None else names[classes[i]],
            likeness=measured[i].likeness,
            drawings=drawings,
            decisions=decisions,
        )
        for i, (drawings, decisions) in zip(drawn, _drawings(sides, one_by_one, settings, is_drawn, names), strict=True)
    ]
    shares = [image.share for image in measured]
    return Comparison(
        model=name,
        weights=host.weights,
        device=environment["device"],
        dtype=str(dtype).removeprefix("torch."),
        scorer=settings.patchifier.scorer_name or scorer,
        budget=budget,
        thresholds=settings.thresholds,
        image_sizes=sorted({(rows * patch_size, cols * patch_size) for rows, cols in (i.grid_size for i in measured)}),
        patch_size=patch_size,
        batch_size=batch_size,
        images=len(measured),
        tokens_uniform=sum(image.num_cells for image in measured) / len(measured),
        keep_ratio=sum(shares) / len(shares),
        keep_spread=(min(shares), max(shares)),
        gflops_uniform=flops[0] / len(measured) / 1e9,
        gflops_adaptive=flops[1] / len(measured) / 1e9,
        seconds_uniform=tuple(seconds[0]),
        seconds_adaptive=tuple(seconds[1]),
        agreement=_mean(image.is_same_class for image in measured) if is_classifier else None,
        top1_uniform=_accuracy(measured, 0, classes),
        top1_adaptive=_accuracy(measured, 1, classes),
        has_size_option=host.library == "timm" and host.adaptive is None,
        likeness=_mean(image.likeness for image in measured),
        likeness_of=measured[0].likeness_of,
        cosine=_mean(image.cosine for image in measured) if has_weights else None,
        results=results,
        skipped=images.skipped,
        environment=environment,
        command=command,
    )


@dataclass(frozen=True, eq=False)
class _ImageMeasurement:
    """One image in both models.

    Attributes:
        patches: (n, 3) rows (y, x, size) in pixels.
        grid_size: (rows, columns) of base patches.
        cosine: Between the outputs.
        classes: Place of the largest number in the uniform and in the adaptive output.
        likeness: Of the answers; None where it is not told by one number.
        likeness_of: What it is.
    """

    patches: np.ndarray
    grid_size: tuple[int, int]
    cosine: float
    classes: tuple[int, int]
    likeness: float | None
    likeness_of: str | None

    @property
    def num_cells(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def share(self) -> float:
        return len(self.patches) / self.num_cells

    @property
    def is_same_class(self) -> bool:
        return self.classes[0] == self.classes[1]

    @property
    def rank(self) -> float:
        """Images whose answers differ most come first."""
        return 0.0 if self.likeness is None else self.likeness

    def whole_patches(self, pixels: Tensor, patch_size: int) -> np.ndarray:
        """(C, H, W) -> (H, W, C), without incomplete patches."""
        rows, cols = self.grid_size
        return pixels[:, : rows * patch_size, : cols * patch_size].permute(1, 2, 0).numpy()


def _adaptive_model(
    host: Host, uniform: Any, target: Target | None, scorer: str, batches: NormalisedBatches, progress: Progress
) -> tuple[Any, str]:
    """The adaptive model with its budget set, and this budget in words."""
    if host.adaptive is None:
        target = target or Target(keep=0.5)
        model = adapt(uniform, **{"scorer": scorer, **target.options()})
        if isinstance(adaptivity_of(model).patchifier.scorer, GlanceScorer):
            fit_glance(model, progress(batches, "fitting the glance", len(batches)))
    else:
        model = host.adaptive.to(batches.device, next(uniform.parameters()).dtype)
        if target is None:
            return model, _saved_budget(adaptivity_of(model))
        _retarget(adaptivity_of(model), target)
    if target.calibrated:
        calibrate(model, progress(batches, "calibrating", len(batches)), keep=target.keep)
    return model, str(target)


def _run_both(
    sides: Sequence[_Side], settings: Any, batches: Iterable[Tensor]
) -> tuple[list[_ImageMeasurement], list[int]]:
    """What both models answer about each image, and their operations on all."""
    measured: list[_ImageMeasurement] = []
    flops = [0, 0]
    for batch in batches:
        layout, outputs = settings.layout(batch), [[], []]  # type: ignore[var-annotated]
        for number, side in enumerate(sides):
            flops[number] += count_flops(partial(_append_answers, outputs[number], side, batch))
        for i, (uniform, adaptive) in enumerate(zip(*outputs, strict=True)):
            measured.append(
                _ImageMeasurement(
                    patches=layout.patches(i).cpu().numpy(),
                    grid_size=layout.grid_sizes[i],
                    cosine=float(cosine_similarity(uniform.numbers, adaptive.numbers, dim=0)),
                    classes=(int(uniform.numbers.argmax()), int(adaptive.numbers.argmax())),
                    likeness=adaptive.likeness(uniform),
                    likeness_of=adaptive.measure,
                )
            )
    return measured, flops


def _append_answers(answers: list[ImageAnswer], side: _Side, batch: Tensor) -> None:
    answers += answers_of(side(batch))


@torch.inference_mode()
def _drawings(
    sides: Sequence[_Side], images: NormalisedBatches, settings: Any, is_drawn: bool, names: Sequence[str]
) -> list[tuple[AnswerDrawings | None, MergeDecisions]]:
    """For each image drawings of the answers, if there are such, and what was compared when it was cut."""
    drawn = []
    for pixels, batch in zip(images.pixels, images, strict=True):
        drawings = None
        if is_drawn:
            answers = [answers_of(side(batch), names)[0] for side in sides]
            drawings = drawings_of(pixels.permute(1, 2, 0).numpy(), *answers)
        of_patches = settings.whole_patches(batch) if hasattr(settings, "whole_patches") else batch
        drawn.append((drawings, merge_decisions(settings.patchifier, of_patches[0])))
    return drawn


def _retarget(settings: Any, target: Target) -> None:
    """Set the budget of a saved model to a target for the patch sizes that it has."""
    if target.thresholds is not None:
        settings.thresholds = target.thresholds
    elif target.per_image:
        settings.keep = target.keep


def _saved_budget(settings: Any) -> str:
    if settings.keep is not None:
        return f"keep {settings.keep:g}, as saved"
    return f"thresholds {', '.join(f'{value:.4g}' for value in settings.thresholds or ())}, as saved"


def _accuracy(measured: Sequence[_ImageMeasurement], side: int, classes: Sequence[int] | None) -> float | None:
    """Share of the images whose class is right."""
    if classes is None:
        return None
    return _mean(image.classes[side] == label for image, label in zip(measured, classes, strict=True))


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None if there are no numbers."""
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
