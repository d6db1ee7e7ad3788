"""The results that the demo page shows for an image: patches and operations at once, predictions and time later."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.api import adapt, adaptivity_of, load_any
from aptvit.calibration.costs import Cost, gflops_of_tokens
from aptvit.files.images import open_image
from aptvit.files.regular import read_regular
from aptvit.hosts.pretrained import class_names, evaluation_transform, num_classes_of
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.report.answers import AnswerDrawings, answers_of, drawings_of
from aptvit.report.drawing import side_by_side
from aptvit.report.patches import draw_layout

__all__ = ["MAX_UPLOAD_PIXELS", "DemoModel", "PatchView", "Predictions", "Settings"]

MAX_UPLOAD_PIXELS = 50_000_000
"""Largest image that is accepted, in pixels."""

_TIMING_SECONDS = 1.0  # about how long both models are timed
_MAX_ROUNDS = 7
_SCORERS = ("entropy", "laplacian", "upsample", "exact", "embedding")


@dataclass(frozen=True)
class Settings:
    """Settings of the page that select the patches.

    Attributes:
        scorer: Name of a scorer.
        scales: Number of patch sizes, the base size included.
        keep: Share of the patch tokens to keep; None to select patches by thresholds.
        thresholds: Thresholds from fine to coarse, at least one for each size above the base patch.
    """

    scorer: str = "entropy"
    scales: int = 3
    keep: float | None = 0.5
    thresholds: tuple[float, ...] = (5.5, 4.0, 2.5)


@dataclass(frozen=True)
class PatchView:
    """The patches that an image is divided into, and the cost of the model on them.

    Attributes:
        patches: The image with the borders of its patches.
        scores: The score map of each size above the base patch, side by side.
        tokens: Number of patch tokens of the adaptive model.
        tokens_uniform: Number of patch tokens of the uniform model.
        gflops: Billions of operations of the adaptive model, without the classifier; None for a model around a ViT.
        gflops_uniform: The same of the uniform model.
    """

    patches: Image.Image
    scores: Image.Image
    tokens: int
    tokens_uniform: int
    gflops: float | None
    gflops_uniform: float | None


@dataclass(frozen=True)
class Predictions:
    """Predictions and time of the adaptive and of the uniform model on an image.

    Attributes:
        seconds: Median time of the adaptive model, from normalised pixels to its output.
        seconds_uniform: Median time of the uniform model.
        speedup: Time of the uniform model over that of the adaptive model, of interleaved runs.
        top: The five likeliest (class, probability) of the adaptive model, in descending order; None if the model has
            random weights or no classes.
        top_uniform: The same of the uniform model.
        drawings: Maps, regions, boxes or points of both models; None of models that answer otherwise.
        likeness: How alike these are, with what it is.
    """

    seconds: float
    seconds_uniform: float
    speedup: Ratio
    top: list[tuple[str, float]] | None = None
    top_uniform: list[tuple[str, float]] | None = None
    drawings: AnswerDrawings | None = None
    likeness: tuple[str, float] | None = None


class DemoModel:
    """A model, uniform and adaptive, that is evaluated on single images with changing settings.

    Threads may share it: settings and forward pass are under a lock.

    Args:
        model: As for `aptvit.api.load_any`; a saved model keeps its patch sizes and scorer.
        checkpoint: File with weights of the timm model, in place of timm's pretrained weights.
        img_size: Side of the input of a timm model in pixels; by default the model's own.
        device: Torch device to run on.
        with_paths: Whether names and code on the page have the folders of a saved model and of the weights, which are
            not for visitors from other machines.
        text: What models of open vocabulary look for.

    Raises:
        ValueError: If the model does not exist.
    """

    def __init__(
        self,
        model: str,
        checkpoint: Path | None = None,
        img_size: int | None = None,
        device: str = "cpu",
        with_paths: bool = True,
        text: Sequence[str] = (),
    ) -> None:
        self.host = host = load_any(model, checkpoint, img_size, text)
        self.name, self.device = model, device
        self.label = model if with_paths or not Path(model).is_dir() else Path(model).resolve().name
        self.weights_file = checkpoint if with_paths or checkpoint is None else Path(checkpoint.name)
        self.img_size = img_size
        self.uniform, self.data, self.weights = host.model, host.data, host.weights
        self._saved: Any = host.adaptive
        self.scorers: tuple[str, ...] = _SCORERS
        self.scales = (2, 4)
        if self._saved is not None:
            settings = adaptivity_of(self._saved.to(device).eval())
            self.scorers = (settings.patchifier.scorer_name or "its own",)
            self.scales = (settings.num_scales, settings.num_scales)
        self.uniform = self.uniform.to(device).eval().requires_grad_(False)
        self.classes = class_names(self.uniform)
        self._adapted = lru_cache(maxsize=4)(self._adapt)
        self._lock = threading.Lock()  # all visitors share the model whose thresholds are set
        keep_freed_memory()

    def settings(self) -> Settings:
        """Return the initial settings: those of a saved model, else the defaults."""
        if self._saved is None:
            return Settings()
        settings = adaptivity_of(self._saved)
        thresholds, keep = settings.thresholds, settings.keep
        if thresholds is None and keep is None:
            keep = 0.5
        count = settings.num_scales - 1
        return Settings(self.scorers[0], self.scales[0], keep, thresholds or Settings().thresholds[:count])

    def read(self, path: Path) -> Tensor:
        """Read an image file and apply the model's evaluation transform.

        Returns:
            (3, H, W) uint8.

        Raises:
            ImageError: If the file is not an image, or has more than `MAX_UPLOAD_PIXELS` pixels.
        """
        # By name and content, as messages are for visitors: they do not show where uploads are kept.
        image = open_image(path.name, data=read_regular(path), max_pixels=MAX_UPLOAD_PIXELS)
        transform = self.host.read or evaluation_transform(self.data)
        return torch.as_tensor(np.asarray(transform(image)))

    @torch.inference_mode()
    def view(self, image: Tensor, settings: Settings) -> PatchView:
        """Divide an image into patches, draw them and count tokens and operations.

        Args:
            image: (3, H, W) uint8 pixels, see `read`.
            settings: What selects the patches.

        Raises:
            ValueError: If the model cannot use the settings.
        """
        with self._lock:
            model, costs = self._model(settings)
            (patches, *scores), layout = draw_layout(adaptivity_of(model).patchifier, image.to(self.device), True)
        tokens, grid = layout.num_patches, math.prod(layout.grid_sizes[0])
        gflops: tuple[float | None, float | None] = None, None
        if costs is not None:
            lengths = np.array([tokens, grid]) + layout.num_prefix_tokens
            gflops = float(costs[0](lengths[:1], grid)[0]), float(costs[1](lengths[1:], grid)[0])
        return PatchView(patches, side_by_side(scores), tokens, grid, *gflops)

    @torch.inference_mode()
    def predict(self, image: Tensor, settings: Settings) -> Predictions:
        """Run both models on an image, interleaved and timed.

        Args:
            image: (3, H, W) uint8 pixels, see `read`.
            settings: What selects the patches.

        Raises:
            ValueError: If the model cannot use the settings.
        """
        with self._lock:
            model, _ = self._model(settings)
            x = adaptivity_of(model).patchifier.normalization.normalised(image[None].to(self.device))
            outputs: list[Any] = [None, None]

            def run(number: int, network: Any) -> None:
                outputs[number] = self.host.run(network, x)

            runs = [partial(run, 0, self.uniform), partial(run, 1, model)]
            for warm_up in runs:
                warm_up()
            start = time.perf_counter()
            interleaved(runs, 1, self.device)
            rounds = int(_TIMING_SECONDS / max(time.perf_counter() - start, 1e-6))
            uniform, adaptive = interleaved(runs, min(max(rounds, 1), _MAX_ROUNDS), self.device)
        speedup = Ratio.of_rounds(uniform, adaptive)
        seconds = float(np.median(adaptive)), float(np.median(uniform))
        of_uniform, of_adaptive = (answers_of(output, self.classes)[0] for output in outputs)
        if of_adaptive.measure is not None:
            drawings = drawings_of(image.permute(1, 2, 0).numpy(), of_uniform, of_adaptive)
            likeness = of_adaptive.measure, of_adaptive.likeness(of_uniform)
            return Predictions(*seconds, speedup, drawings=drawings, likeness=likeness)  # type: ignore[arg-type]
        top, top_uniform = (self._top(answer.numbers) for answer in (of_adaptive, of_uniform))
        return Predictions(*seconds, speedup, top, top_uniform)

    def largest_scores(self, image: Tensor, scorer: str, scales: int) -> list[float]:
        """Return the largest score of an image for each size above the base patch, from fine to coarse.

        Args:
            image: (3, H, W) uint8 pixels, see `read`.
            scorer: Name of a scorer.
            scales: Number of patch sizes, the base size included.
        """
        with self._lock:
            model, _ = self._model(Settings(scorer, scales))
            ((_, maps),) = adaptivity_of(model).scores(image[None].to(self.device))
        return [float(scores[torch.isfinite(scores)].max()) for scores in maps.values()]

    def snippet(self, settings: Settings) -> str:
        """Return Python code that creates the adaptive model with these settings and runs it on ``images``."""
        if settings.keep is not None:
            option, value = "keep", f"{settings.keep:g}"
        else:
            numbers = [f"{threshold:g}" for threshold in settings.thresholds[: settings.scales - 1]]
            option, value = "thresholds", f"({', '.join(numbers)}{',' if len(numbers) == 1 else ''})"
        is_of_timm = self.host.library == "timm"
        run = "logits = model(images)\n" if is_of_timm else "output = model(pixel_values=images)\n"
        if self._saved is not None:
            name = "model" if adaptivity_of(self._saved) is self._saved else "model.aptvit"
            code = f"model = aptvit.from_pretrained({self.label!r}).eval()\n{name}.{option} = {value}"
            return f"import aptvit\n\n{code}\n{run}"
        arguments = "" if self.img_size is None else f", img_size={self.img_size}"
        if self.weights_file is not None:
            arguments += f", pretrained_cfg_overlay={{'file': {str(self.weights_file)!r}}}"
        options = f"{option}={value}"
        options += f", scales={settings.scales}" if settings.keep is not None and settings.scales != 2 else ""
        options += f", scorer={settings.scorer!r}" if settings.scorer != "entropy" else ""
        code = f"model = aptvit.adapt(host, {options})\n{run}"
        if is_of_timm:
            host = f"host = timm.create_model({self.label!r}, pretrained=True{arguments}).eval()\n"
            return f"import aptvit\nimport timm\n\n{host}{code}"
        kind = type(self.uniform).__name__
        host = f"host = {kind}.from_pretrained({self.label!r}).eval()\n"
        return f"import aptvit\nfrom transformers import {kind}\n\n{host}{code}"

    def _adapt(self, scorer: str, scales: int) -> tuple[Any, tuple[Cost, Cost] | None]:
        model = self._saved or adapt(self.uniform, scorer=scorer, scales=scales).eval()
        if not isinstance(model, AdaptivePatchTransformer):
            return model, None
        return model, (gflops_of_tokens(model), gflops_of_tokens(model, with_scoring=False))

    def _model(self, settings: Settings) -> tuple[Any, tuple[Cost, Cost] | None]:
        """Set up the shared model with these settings; also the cost of tokens in it and in the uniform model.

        The caller holds the lock, because the next call changes the settings.
        """
        model, costs = self._adapted(settings.scorer, settings.scales)
        if settings.keep is not None:
            adaptivity_of(model).keep = settings.keep
        else:
            adaptivity_of(model).thresholds = settings.thresholds[: settings.scales - 1]
        return model, costs

    def _top(self, logits: Tensor) -> list[tuple[str, float]] | None:
        if self.weights == "random" or not num_classes_of(self.uniform):
            return None
        values, indices = logits.softmax(0).topk(min(5, len(logits)))
        names = [self.classes[i] if self.classes else f"class {i}" for i in indices.tolist()]
        return list(zip(names, values.tolist(), strict=True))
