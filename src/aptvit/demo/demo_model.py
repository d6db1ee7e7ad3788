"""The results that the demo page shows for an image: patches and operations at once, predictions and time later."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.api import load_saved
from aptvit.calibration.costs import Cost, gflops_of_tokens
from aptvit.files.images import open_image
from aptvit.files.regular import read_regular
from aptvit.hosts.pretrained import class_names, evaluation_transform, load_host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.report.drawing import side_by_side
from aptvit.report.patches import draw_layout

__all__ = ["MAX_UPLOAD_PIXELS", "DemoModel", "PatchView", "Predictions", "Settings"]

MAX_UPLOAD_PIXELS = 50_000_000
"""Largest image that is accepted, in pixels."""

_TIMING_SECONDS = 1.0  # about how long both models are timed
_MAX_ROUNDS = 7
_SCORERS = ("entropy", "laplacian", "upsample", "embedding")


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
        gflops: Billions of operations of the adaptive model, without the classifier.
        gflops_uniform: Billions of operations of the uniform model, without the classifier.
    """

    patches: Image.Image
    scores: Image.Image
    tokens: int
    tokens_uniform: int
    gflops: float
    gflops_uniform: float


@dataclass(frozen=True)
class Predictions:
    """Predictions and time of the adaptive and of the uniform model on an image.

    Attributes:
        seconds: Median time of the adaptive model, from normalised pixels to logits.
        seconds_uniform: Median time of the uniform model.
        speedup: Time of the uniform model over that of the adaptive model, of interleaved runs.
        top: The five likeliest (class, probability) of the adaptive model, in descending order; None if the model has
            random weights or no classes.
        top_uniform: The same of the uniform model.
    """

    seconds: float
    seconds_uniform: float
    speedup: Ratio
    top: list[tuple[str, float]] | None
    top_uniform: list[tuple[str, float]] | None


class DemoModel:
    """A model, uniform and adaptive, that is evaluated on single images with changing settings.

    Threads may share it: settings and forward pass are under a lock.

    Args:
        model: Name of a timm model, or a folder that ``save_pretrained`` or a training wrote; a saved model keeps its
            patch sizes and scorer.
        checkpoint: File with weights of the timm model, in place of timm's pretrained weights.
        img_size: Side of the input of a timm model in pixels; by default the model's own.
        device: Torch device to run on.
        with_paths: Whether names and code on the page have the folders of a saved model and of the weights, which are
            not for visitors from other machines.

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
    ) -> None:
        saved = load_saved(model)
        self.name, self.device = model, device
        self.label = model if with_paths or saved is None else Path(model).resolve().name
        self.weights_file = checkpoint if with_paths or checkpoint is None else Path(checkpoint.name)
        self.img_size = img_size
        self.scorers: tuple[str, ...]
        self._saved: AdaptivePatchTransformer | None = None
        if saved is None:
            host = load_host(model, checkpoint, img_size)
            self.uniform, self.data, self.weights = host.model, host.data, host.weights
            self.scorers, self.scales = _SCORERS, (2, 4)
        else:
            self._saved, self.data = saved
            self.uniform, self.weights = self._saved.adapter.vit, "trained"
            self.scorers = (self._saved.patchifier.scorer_name or "its own",)
            self.scales = (self._saved.num_scales, self._saved.num_scales)
            self._saved.to(device).eval()
        self.uniform = self.uniform.to(device).eval().requires_grad_(False)
        self.classes = class_names(self.uniform)
        self._adapted = lru_cache(maxsize=4)(self._adapt)
        self._lock = threading.Lock()  # all visitors share the model whose thresholds are set
        keep_freed_memory()

    def settings(self) -> Settings:
        """Return the initial settings: those of a saved model, else the defaults."""
        if self._saved is None:
            return Settings()
        thresholds, keep = self._saved.thresholds, self._saved.keep
        if thresholds is None and keep is None:
            keep = 0.5
        count = self._saved.num_scales - 1
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
        return torch.as_tensor(np.asarray(evaluation_transform(self.data)(image)))

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
            model, (adaptive, uniform) = self._model(settings)
            (patches, *scores), layout = draw_layout(model.patchifier, image.to(self.device), True)
        tokens, grid = layout.num_patches, math.prod(layout.grid_sizes[0])
        lengths = np.array([tokens, grid]) + layout.num_prefix_tokens
        gflops = float(adaptive(lengths[:1], grid)[0]), float(uniform(lengths[1:], grid)[0])
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
            x = model.patchifier.normalization.normalised(image[None].to(self.device))
            outputs: list[Any] = [None, None]

            def run(number: int, network: Any) -> None:
                outputs[number] = network(x)

            runs = [partial(run, 0, self.uniform), partial(run, 1, model)]
            for warm_up in runs:
                warm_up()
            start = time.perf_counter()
            interleaved(runs, 1, self.device)
            rounds = int(_TIMING_SECONDS / max(time.perf_counter() - start, 1e-6))
            uniform, adaptive = interleaved(runs, min(max(rounds, 1), _MAX_ROUNDS), self.device)
        top_uniform, top = (self._top(logits) for logits in outputs)
        speedup = Ratio.of_rounds(uniform, adaptive)
        return Predictions(float(np.median(adaptive)), float(np.median(uniform)), speedup, top, top_uniform)

    def largest_scores(self, image: Tensor, scorer: str, scales: int) -> list[float]:
        """Return the largest score of an image for each size above the base patch, from fine to coarse.

        Args:
            image: (3, H, W) uint8 pixels, see `read`.
            scorer: Name of a scorer.
            scales: Number of patch sizes, the base size included.
        """
        with self._lock:
            ((_, maps),) = self._model(Settings(scorer, scales))[0].scores(image[None].to(self.device))
        return [float(scores[torch.isfinite(scores)].max()) for scores in maps.values()]

    def snippet(self, settings: Settings) -> str:
        """Return Python code that creates the adaptive model with these settings and runs it on ``images``."""
        if settings.keep is not None:
            option, value = "keep", f"{settings.keep:g}"
        else:
            numbers = [f"{threshold:g}" for threshold in settings.thresholds[: settings.scales - 1]]
            option, value = "thresholds", f"({', '.join(numbers)}{',' if len(numbers) == 1 else ''})"
        if self._saved is not None:
            code = f"model = aptvit.from_pretrained({self.label!r}).eval()\nmodel.{option} = {value}"
            return f"import aptvit\n\n{code}\nlogits = model(images)\n"
        arguments = "" if self.img_size is None else f", img_size={self.img_size}"
        if self.weights_file is not None:
            arguments += f", pretrained_cfg_overlay={{'file': {str(self.weights_file)!r}}}"
        options = f"{option}={value}"
        options += f", scales={settings.scales}" if settings.keep is not None and settings.scales != 2 else ""
        options += f", scorer={settings.scorer!r}" if settings.scorer != "entropy" else ""
        code = f"host = timm.create_model({self.label!r}, pretrained=True{arguments}).eval()\n"
        return f"import aptvit\nimport timm\n\n{code}model = aptvit.adapt(host, {options})\nlogits = model(images)\n"

    def _adapt(self, scorer: str, scales: int) -> tuple[AdaptivePatchTransformer, tuple[Cost, Cost]]:
        model = self._saved or AdaptivePatchTransformer(self.uniform, scorer=scorer, scales=scales).eval()
        return model, (gflops_of_tokens(model), gflops_of_tokens(model, with_scoring=False))

    def _model(self, settings: Settings) -> tuple[AdaptivePatchTransformer, tuple[Cost, Cost]]:
        """Set up the shared model with these settings; also the cost of tokens in it and in the uniform model.

        The caller holds the lock, because the next call changes the settings.
        """
        model, costs = self._adapted(settings.scorer, settings.scales)
        if settings.keep is not None:
            model.keep = settings.keep
        else:
            model.thresholds = settings.thresholds[: settings.scales - 1]
        return model, costs

    def _top(self, logits: Any) -> list[tuple[str, float]] | None:
        if self.weights == "random" or not getattr(self.uniform, "num_classes", 0):
            return None
        values, indices = logits[0].float().softmax(0).topk(min(5, logits.shape[1]))
        names = [self.classes[i] if self.classes else f"class {i}" for i in indices.tolist()]
        return list(zip(names, values.tolist(), strict=True))
