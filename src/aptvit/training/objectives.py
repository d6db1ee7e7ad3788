"""Losses: of labels, and of the distance to a teacher's probabilities, features and maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.patching.layout import PatchLayout
from aptvit.training.recipes.distillation import DistillationRecipe

__all__ = ["Learner", "Outputs", "distillation_loss", "label_loss", "map_losses"]


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model that losses compare.

    Attributes:
        logits: (B, classes).
        pooled: (B, D) features that the classifier reads.
        maps: For each depth (B, N, D): features at each base cell.
    """

    logits: Tensor
    pooled: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class Learner(nn.Module):
    """A model of timm's protocol whose forward pass gives all outputs that a loss compares.

    Args:
        model: Uniform, adaptive or reduced in another way.
        depths: Blocks whose feature maps are wanted.
        with_features: Whether pooled features are wanted.
    """

    def __init__(self, model: Any, depths: Sequence[int] = (), with_features: bool = False) -> None:
        super().__init__()
        self.model = model
        self.depths, self.with_features = list(depths), with_features or bool(depths)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Outputs:
        """Images (B, C, H, W), normalised."""
        model, options = self.model, {} if layout is None else {"layout": layout}
        if not self.with_features:
            return Outputs(model(images, **options))
        maps: Sequence[Tensor] = ()
        if self.depths:
            features, maps = model.forward_intermediates(images, self.depths, norm=True, output_fmt="NLC", **options)
        else:
            features = model.forward_features(images, **options)
        pooled = model.forward_head(features, pre_logits=True)
        return Outputs(model.forward_head(features), pooled, tuple(maps))


def block_depths(model: Any, recipe: DistillationRecipe) -> list[int]:
    """Numbers of the blocks that a recipe compares."""
    if not recipe.features_weight:
        return []
    num_blocks = len(model.blocks)
    return sorted({max(1, round(depth * num_blocks)) - 1 for depth in recipe.feature_depths})


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each image. (B, classes), (B, classes) -> (B,)"""
    return -(targets * logits.float().log_softmax(1)).sum(1)


def distillation_loss(student: Outputs, teacher: Outputs, recipe: DistillationRecipe) -> Tensor:
    """Distance of each image's probabilities and features from the teacher's. -> (B,)

    The divergence of the probabilities at a temperature, times the temperature's square, as is usual; the distance
    between pooled features, relative to the variance of the teacher's; and that between maps (`map_losses`). No image's
    loss depends on the others.
    """
    warmth = recipe.temperature
    answers = (student.logits.float() / warmth).log_softmax(1), (teacher.logits.float() / warmth).log_softmax(1)
    divergence = F.kl_div(*answers, log_target=True, reduction="none").sum(1) * warmth**2
    loss = recipe.logits_weight * divergence
    if recipe.pooled_weight and student.pooled is not None and teacher.pooled is not None:
        loss = loss + recipe.pooled_weight * _relative(student.pooled, teacher.pooled)
    if recipe.features_weight and student.maps:
        loss = loss + recipe.features_weight * map_losses(student.maps, teacher.maps, channel_dim=2)
    return loss


def map_losses(maps: Sequence[Tensor], expected: Sequence[Tensor], channel_dim: int = 1) -> Tensor:
    """Distance of maps from those of a teacher, for each image; no image's loss depends on the others.

    Mean squared distance, relative to the variance of a channel within the image: a few channels vary so much more than
    all others that they alone would be learned. Mean over depths.

    Args:
        maps: (B, D, h, w), or (B, N, D) with ``channel_dim=2``, each.
        expected: As many, of the teacher.
        channel_dim: Where the channels are.

    Returns:
        (B,).
    """
    far = []
    for guess, target in zip(maps, expected, strict=True):
        cells = [dim for dim in range(1, target.ndim) if dim != channel_dim]
        spread = target.float().var(cells, keepdim=True)
        spread = torch.maximum(
            spread, 0.01 * spread.mean(channel_dim, keepdim=True)
        )  # channels that hardly vary do not count more
        far.append(((guess.float() - target.float()).square() / spread).flatten(1).mean(1))
    return torch.stack(far).mean(0)


def _relative(guess: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance over the variance of the image's own target. (B, ..., D) -> (B,)"""
    guess, target = guess.float().flatten(1), target.float().flatten(1)
    return (guess - target).square().mean(1) / target.var(1).clamp(min=1e-6)
