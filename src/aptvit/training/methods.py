"""The model that a recipe trains: adaptive, or a baseline with the same share of the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from aptvit.calibration.calibrator import Calibrator
from aptvit.merging import downscale, random, tome
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.scorers.harm import HarmScorer, fit_harm
from aptvit.scorers.sizes import Answers
from aptvit.scorers.spread import SpreadScorer, fit_spread
from aptvit.training.recipes.common import Recipe

__all__ = ["Shares", "build_model", "set_drop_path", "settings_from"]


def build_model(host: nn.Module, recipe: Recipe, **options: Any) -> Any:
    """Build the model that a recipe trains. It has timm's protocol and shares the weights of the host.

    Args:
        host: The pretrained model.
        recipe: The method and its settings.
        options: Further options of `AdaptivePatchTransformer` for adaptive models, such as ``window_size``.

    Raises:
        ValueError: If the method does not support the host.
    """
    if recipe.method in ("apt", "resize"):
        budget: dict[str, Any] = {"thresholds": recipe.thresholds or None}
        if recipe.per_image:
            budget = {"keep": recipe.keep}
        elif recipe.blend:
            uncalibrated = (-1.0,) * (recipe.scales - 1)
            budget = {"thresholds": uncalibrated, "keep": recipe.keep, "blend": recipe.blend}
        return AdaptivePatchTransformer(
            host,
            scales=None if recipe.thresholds else recipe.scales,
            scorer=recipe.scorer,
            resize_only=recipe.resize_only or recipe.method == "resize",
            init=recipe.init,
            area_bias=recipe.area_bias,
            reading=recipe.reading,
            **budget,
            **options,
        )
    if recipe.method == "uniform":
        return host
    if recipe.method == "random":
        return random(host, recipe.keep, seed=recipe.seed)
    return (downscale if recipe.method == "downscale" else tome)(host, keep=recipe.keep)


def settings_from(recipe: Recipe, model: AdaptivePatchTransformer) -> Recipe:
    """Return a recipe with the patch sizes, scorer and sub-patch branch of an adaptive model that is trained further.

    Args:
        recipe: The recipe.
        model: The adaptive model.

    Raises:
        ValueError: If its scorer is a function, or the recipe is for another method.
    """
    if recipe.method != "apt":
        raise ValueError(f"method={recipe.method} starts from a uniform model: give that instead of an adaptive one")
    if model.patchifier.scorer_name is None:
        raise ValueError("a scorer that is a callable cannot be trained further: adapt() with the name of a scorer")
    values: dict[str, Any] = {"scales": model.num_scales, "scorer": model.patchifier.scorer_name}
    values |= {"resize_only": model.resize_only, "area_bias": model.area_bias, "reading": model.reading}
    return replace(recipe, **values)


def set_drop_path(vit: Any, rate: float) -> None:
    """Set stochastic depth as timm does: the rate rises linearly from 0 in the first block to ``rate`` in the last."""
    if not rate:
        return
    last = max(len(vit.blocks) - 1, 1)
    for i, block in enumerate(vit.blocks):
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate * i / last) if i else nn.Identity())


class Shares:
    """The shares of the tokens that a recipe trains: calibrates thresholds for each share and sets them in the model.

    Baselines have a single fixed share; for them nothing is calibrated or set.

    Args:
        model: The model that is trained.
        recipe: The shares, and whether each image keeps them or only the average.

    Attributes:
        thresholds: Current thresholds by share, if shares are averages over images.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.is_adaptive = isinstance(model, AdaptivePatchTransformer) and recipe.method != "uniform"
        self.calibrates = self.is_adaptive and not recipe.per_image and not recipe.thresholds
        self.thresholds: dict[float, tuple[float, ...]] = {}

    @property
    def in_use(self) -> tuple[float, ...]:
        """The shares that the method can be set to, the main share first."""
        if self.recipe.method == "uniform":
            return (1.0,)
        return self.recipe.shares if self.is_adaptive and not self.recipe.thresholds else (self.recipe.keep,)

    def prepare(self, plain: Iterable[Tensor], augmented: Iterable[Tensor], outputs: Answers | None = None) -> None:
        """Train the scorer if it has weights to train, and calibrate thresholds.

        Args:
            plain: Batches of images as in evaluation, to train the scorer.
            augmented: Batches of images as in training, to calibrate thresholds.
            outputs: Outputs of the uniform network at each place of an image, see `aptvit.fit_spread`.

        Raises:
            ValueError: If the scorer needs outputs of a uniform network and there are none.
        """
        scorer = self.model.patchifier.scorer if self.is_adaptive else None
        if isinstance(scorer, GlanceScorer):
            fit_glance(self.model, plain)
        if isinstance(scorer, HarmScorer):
            fit_harm(self.model, plain, outputs)
        if isinstance(scorer, SpreadScorer):
            if outputs is None:
                raise ValueError(
                    "scorer=spread predicts the outputs of a detector or segmenter: name its training with --start"
                )
            fit_spread(self.model, plain, outputs)
        self.calibrate(augmented)

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Calibrate the thresholds of each share on batches of images, (B, C, H, W) each, if shares are averages."""
        if not self.calibrates:
            return
        calibrators = {share: Calibrator(self.model, {"keep": share}) for share in self.in_use}
        for batch in batches:
            scored = self.model.scores(batch)
            for calibrator in calibrators.values():
                calibrator.add_scored(scored)
        for share, calibrator in calibrators.items():
            self.thresholds[share] = calibrator.solve().thresholds

    def set(self, share: float) -> None:
        """Set the model to keep a share of the tokens."""
        if not self.is_adaptive or self.recipe.thresholds:
            return
        if self.recipe.per_image:
            self.model.keep = share
        else:
            self.model.budget = self.model.budget.deciding(self.thresholds[share], share if self.recipe.blend else None)
