"""One model and one photo at a time: patches, tokens and operations at once, answers and time soon after."""

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
from aptvit.files.images import ImageError, open_image
from aptvit.hosts.pretrained import class_names, evaluation_transform, load_host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.report.drawing import side_by_side
from aptvit.report.patches import draw_layout

__all__ = ["MAX_PIXELS", "Answers", "Look", "Player", "Settings"]

MAX_PIXELS = 50_000_000
"""Largest photo that is taken, in pixels."""

_PATIENCE = 1.0  # seconds of timing
_MOST_ROUNDS = 7
SCORERS = ("entropy", "laplacian", "upsample", "embedding")


@dataclass(frozen=True)
class Settings:
    """What decides about the patches.

    Attributes:
        scorer: Name of a scorer.
        scales: Patch sizes, the base size included.
        keep: Share of the tokens; None where thresholds decide.
        thresholds: From fine to coarse, at least as many as there are sizes above the base patch.
    """

    scorer: str = "entropy"
    scales: int = 3
    keep: float | None = 0.5
    thresholds: tuple[float, ...] = (5.5, 4.0, 2.5)


@dataclass(frozen=True)
class Look:
    """A photo in patches.

    Attributes:
        patches: The photo with its patches drawn.
        scores: Scores of all candidates, a picture for each size side by side.
        tokens: Patch tokens.
        tokens_uniform: Of equal patches.
        gflops: Billions of operations, class head left out.
        gflops_uniform: Of the uniform model.
    """

    patches: Image.Image
    scores: Image.Image
    tokens: int
    tokens_uniform: int
    gflops: float
    gflops_uniform: float


@dataclass(frozen=True)
class Answers:
    """What both models make of a photo, and how long they take.

    Attributes:
        seconds: Median of the adaptive model, from a normalised picture to logits.
        seconds_uniform: Median of the uniform model.
        speedup: Ratio of the pairs.
        top: (class, probability) of the adaptive model, best first; None if its weights are random.
        top_uniform: Of the uniform model.
    """

    seconds: float
    seconds_uniform: float
    speedup: Ratio
    top: list[tuple[str, float]] | None
    top_uniform: list[tuple[str, float]] | None


class Player:
    """A model that can be looked at.

    Args:
        model: timm's name, or a folder that ``save_pretrained`` or a training wrote, whose patch sizes and scorer stay
            as they are.
        checkpoint: Weights of a timm model.
        img_size: Side of its input in pixels.
        device: Where it runs.

    Raises:
        ValueError: If there is no such model.
    """

    def __init__(
        self, model: str, checkpoint: Path | None = None, img_size: int | None = None, device: str = "cpu"
    ) -> None:
        saved = load_saved(model)
        self.name, self.device = model, device
        self.checkpoint, self.img_size = checkpoint, img_size
        self.scorers: tuple[str, ...]
        self._saved: AdaptivePatchTransformer | None = None
        if saved is None:
            host = load_host(model, checkpoint, img_size)
            self.uniform, self.data, self.weights = host.model, host.data, host.weights
            self.scorers, self.scales = SCORERS, (2, 4)
        else:
            self._saved, self.data = saved
            self.uniform, self.weights = self._saved.adapter.vit, "trained"
            self.scorers = (self._saved.patchifier.scorer_name or "its own",)
            self.scales = (self._saved.num_scales, self._saved.num_scales)
            self._saved.to(device).eval()
        self.uniform = self.uniform.to(device).eval().requires_grad_(False)
        self.classes = class_names(self.uniform, getattr(self.uniform, "num_classes", 0))
        self._adapted = lru_cache(maxsize=4)(self._adapt)
        self._lock = threading.Lock()  # thresholds are set on a model that all visitors share
        keep_freed_memory()

    def settings(self) -> Settings:
        """What to begin with."""
        if self._saved is None:
            return Settings()
        own, some = self._saved.thresholds, self._saved.keep
        count = self._saved.num_scales - 1
        keep = some if some is not None else (0.5 if own is None else None)
        return Settings(self.scorers[0], self.scales[0], keep, own or Settings().thresholds[:count])

    def read(self, path: Path) -> Tensor:
        """A photo as the model sees it, (3, H, W) uint8.

        Raises:
            ImageError: If it is none, or too large.
        """
        try:
            with Image.open(path) as header:
                width, height = header.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImageError(f"{path.name} cannot be read as a photo") from error
        if width * height > MAX_PIXELS:
            raise ImageError(f"{path.name} has {width}x{height} pixels: make it smaller than {MAX_PIXELS:,} in all")
        return torch.as_tensor(np.asarray(evaluation_transform(self.data)(open_image(path))))

    @torch.inference_mode()
    def look(self, photo: Tensor, settings: Settings) -> Look:
        """Cut a photo into patches.

        Raises:
            ValueError: If the settings cannot be met.
        """
        with self._lock:
            model, (adaptive, uniform) = self._model(settings)
            (patches, *scores), layout = draw_layout(model.patchifier, photo.to(self.device), True)
        tokens, grid = layout.num_patches, math.prod(layout.grid_sizes[0])
        lengths = np.array([tokens, grid]) + layout.num_prefix_tokens
        gflops = float(adaptive(lengths[:1], grid)[0]), float(uniform(lengths[1:], grid)[0])
        return Look(patches, side_by_side(scores), tokens, grid, *gflops)

    @torch.inference_mode()
    def ask(self, photo: Tensor, settings: Settings) -> Answers:
        """Both models on a photo, in turn.

        Raises:
            ValueError: If the settings cannot be met.
        """
        with self._lock:
            model, _ = self._model(settings)
            x = model.patchifier.normalization.normalised(photo[None].to(self.device))
            outputs: list[Any] = [None, None]

            def run(number: int, network: Any) -> None:
                outputs[number] = network(x)

            runs = [partial(run, 0, self.uniform), partial(run, 1, model)]
            for one in runs:
                one()
            start = time.perf_counter()
            interleaved(runs, 1, self.device)
            rounds = int(_PATIENCE / max(time.perf_counter() - start, 1e-6))
            uniform, adaptive = interleaved(runs, min(max(rounds, 1), _MOST_ROUNDS), self.device)
        top_uniform, top = (self._top(logits) for logits in outputs)
        faster = Ratio.of_rounds(uniform, adaptive)
        return Answers(float(np.median(adaptive)), float(np.median(uniform)), faster, top, top_uniform)

    def most(self, photo: Tensor, scorer: str, scales: int) -> list[float]:
        """The largest score of this photo, for each size above the base patch."""
        with self._lock:
            ((_, maps),) = self._model(Settings(scorer, scales))[0].scores(photo[None].to(self.device))
        return [float(one[torch.isfinite(one)].max()) for one in maps.values()]

    def snippet(self, settings: Settings) -> str:
        """Python that makes this model."""
        if settings.keep is not None:
            wish, value = "keep", f"{settings.keep:g}"
        else:
            numbers = [f"{one:g}" for one in settings.thresholds[: settings.scales - 1]]
            wish, value = "thresholds", f"({', '.join(numbers)}{',' if len(numbers) == 1 else ''})"
        if self._saved is not None:
            made = f"model = aptvit.from_pretrained({self.name!r}).eval()\nmodel.{wish} = {value}"
            return f"import aptvit\n\n{made}\nlogits = model(images)\n"
        where = "" if self.img_size is None else f", img_size={self.img_size}"
        if self.checkpoint is not None:
            where += f", pretrained_cfg_overlay={{'file': {str(self.checkpoint)!r}}}"
        options = f"{wish}={value}"
        options += f", scales={settings.scales}" if settings.keep is not None and settings.scales != 2 else ""
        options += f", scorer={settings.scorer!r}" if settings.scorer != "entropy" else ""
        made = f"host = timm.create_model({self.name!r}, pretrained=True{where}).eval()\n"
        return f"import aptvit\nimport timm\n\n{made}model = aptvit.adapt(host, {options})\nlogits = model(images)\n"

    def _adapt(self, scorer: str, scales: int) -> tuple[AdaptivePatchTransformer, tuple[Cost, Cost]]:
        model = self._saved or AdaptivePatchTransformer(self.uniform, scorer=scorer, scales=scales).eval()
        return model, (gflops_of_tokens(model), gflops_of_tokens(model, with_scoring=False))

    def _model(self, settings: Settings) -> tuple[AdaptivePatchTransformer, tuple[Cost, Cost]]:
        """The model with these settings, until somebody else asks; and what tokens cost it, and its host."""
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
