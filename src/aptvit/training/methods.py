"""The model that a recipe trains: adaptive, or a baseline made for the same share of the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from aptvit.calibration.calibrator import Calibrator
from aptvit.merging import downscale, random, tome
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.scorers.spread import Answers, SpreadScorer, fit_spread
from aptvit.training.recipes.common import Recipe

__all__ = ["Shares", "build_model", "set_drop_path"]


def build_model(host: nn.Module, recipe: Recipe, **options: Any) -> Any:
    """A model of timm's protocol that shares the host's weights.

    Args:
        host: The pretrained model.
        recipe: The method and its options.
        options: More of them for adaptive models, such as windows.

    Raises:
        ValueError: If the method cannot run on this host.
    """
    if recipe.method in ("apt", "resize"):
        budget: dict[str, Any] = {"thresholds": recipe.thresholds or None}
        if recipe.per_image:
            budget = {"keep": recipe.keep}
        elif recipe.blend:
            nothing_yet = (-1.0,) * (recipe.scales - 1)
            budget = {"thresholds": nothing_yet, "keep": recipe.keep, "blend": recipe.blend}
        return AdaptivePatchTransformer(
            host,
            scales=None if recipe.thresholds else recipe.scales,
            scorer=recipe.scorer,
            resize_only=recipe.resize_only or recipe.method == "resize",
            init=recipe.init,
            area_bias=recipe.area_bias,
            **budget,
            **options,
        )
    if recipe.method == "uniform":
        return host
    if recipe.method == "random":
        return random(host, recipe.keep, seed=recipe.seed)
    return _downscaled(host, recipe.keep) if recipe.method == "downscale" else _merged(host, recipe.keep)


def set_drop_path(vit: Any, rate: float) -> None:
    """Stochastic depth as timm builds it in: none in the first block, ``rate`` in the last, linear between."""
    if not rate:
        return
    last = max(len(vit.blocks) - 1, 1)
    for i, block in enumerate(vit.blocks):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate * i / last) if i else nn.Identity())


def _downscaled(host: Any, keep: float) -> Any:
    patch, grid = host.patch_embed.patch_size[0], host.patch_embed.grid_size[0]
    return downscale(host, max(1, round(grid * keep**0.5)) * patch)


def _merged(host: Any, keep: float) -> Any:
    """ToMe with the r whose tokens per block are nearest to the share."""
    rows, cols = host.patch_embed.grid_size
    wanted = host.num_prefix_tokens + keep * rows * cols

    def distance(r: int) -> float:
        per_block = tome(host, r).tokens_per_block((rows, cols))
        return abs(sum(per_block) / len(per_block) - wanted)

    return tome(host, min(range((rows * cols) // 2), key=distance))


class Shares:
    """Sets how many tokens an adaptive model keeps, with the thresholds of each share.

    Does nothing for other methods, whose share is built in.

    Args:
        model: The model that is trained.
        recipe: Shares and how they are kept.

    Attributes:
        thresholds: For each share those that are in use, where images of one batch may keep different shares.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.is_adaptive = isinstance(model, AdaptivePatchTransformer) and recipe.method != "uniform"
        self.calibrates = self.is_adaptive and not recipe.per_image and not recipe.thresholds
        self.thresholds: dict[float, tuple[float, ...]] = {}

    @property
    def of_method(self) -> tuple[float, ...]:
        """The shares that make a difference."""
        if self.recipe.method == "uniform":
            return (1.0,)
        return self.recipe.shares if self.is_adaptive and not self.recipe.thresholds else (self.recipe.keep,)

    def prepare(self, plain: Iterable[Tensor], trained: Iterable[Tensor], answers: Answers | None = None) -> None:
        """Train the scorer, if it needs that, on plain images; find thresholds for the augmented ones.

        Args:
            plain: Images as they are evaluated.
            trained: Images as they are trained on.
            answers: Outputs of the uniform network at each place, see `aptvit.fit_spread`.

        Raises:
            ValueError: If the scorer predicts outputs and there are none.
        """
        scorer = self.model.patchifier.scorer if self.is_adaptive else None
        if isinstance(scorer, GlanceScorer):
            fit_glance(self.model, plain)
        if isinstance(scorer, SpreadScorer):
            if answers is None:
                raise ValueError(
                    "scorer=spread predicts the outputs of a detector or segmenter: name its training with --start"
                )
            fit_spread(self.model, plain, answers)
        self.calibrate(trained)

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Find thresholds for each share on these images, where shares are averages."""
        if not self.calibrates:
            return
        calibrators = {share: Calibrator(self.model, {"keep": share}) for share in self.of_method}
        for batch in batches:
            scored = self.model.scores(batch)
            for calibrator in calibrators.values():
                calibrator.add_scored(scored)
        for share, calibrator in calibrators.items():
            self.thresholds[share] = calibrator.solve().thresholds

    def set(self, share: float) -> None:
        """From now on the model keeps this share."""
        if not self.is_adaptive or self.recipe.thresholds:
            return
        if self.recipe.per_image:
            self.model.keep = share
        else:
            self.model.budget = self.model.budget.deciding(self.thresholds[share], share if self.recipe.blend else None)
