"""Losses: cross-entropy with labels, and distances to the probabilities, features and feature maps of a teacher."""

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
        pooled: (B, D) input of the classifier; None if it was not requested.
        maps: For each depth, features of each base cell, (B, N, D).
    """

    logits: Tensor
    pooled: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class Learner(nn.Module):
    """A classifier whose forward pass returns all outputs that a loss compares.

    Args:
        model: A model with timm's protocol: uniform, adaptive or a baseline.
        depths: Numbers of the blocks whose feature maps are returned.
        with_features: Whether pooled features are returned; they are if there are depths.
    """

    def __init__(self, model: Any, depths: Sequence[int] = (), with_features: bool = False) -> None:
        super().__init__()
        self.model = model
        self.depths, self.with_features = list(depths), with_features or bool(depths)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Outputs:
        """Run the model.

        Args:
            images: (B, C, H, W) normalised images.
            layout: Layout of the images, for adaptive models.
        """
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
    """Return the numbers of the blocks whose feature maps a recipe compares, in ascending order."""
    if not recipe.features_weight:
        return []
    num_blocks = len(model.blocks)
    return sorted({max(1, round(depth * num_blocks)) - 1 for depth in recipe.feature_depths})


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each image.

    Args:
        logits: (B, classes).
        targets: (B, classes) probabilities.

    Returns:
        (B,).
    """
    return -(targets * logits.float().log_softmax(1)).sum(1)


def distillation_loss(student: Outputs, teacher: Outputs, recipe: DistillationRecipe) -> Tensor:
    """Weighted sum of distances to a teacher: of probabilities, of pooled features and of feature maps.

    The KL divergence of the probabilities at a temperature, times its square; the distance of pooled features, relative
    to the variance of the teacher's; and that of feature maps (`map_losses`). The loss of an image does not depend on
    the other images.

    Args:
        student: Outputs of the trained model.
        teacher: Outputs of the teacher on the same images.
        recipe: The weights, and the temperature.

    Returns:
        (B,).
    """
    student_logits, teacher_logits = (outputs.logits.float() / recipe.temperature for outputs in (student, teacher))
    log_probabilities = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    divergence = F.kl_div(*log_probabilities, log_target=True, reduction="none").sum(1) * recipe.temperature**2
    loss = recipe.logits_weight * divergence
    if recipe.pooled_weight and student.pooled is not None and teacher.pooled is not None:
        loss = loss + recipe.pooled_weight * _relative(student.pooled, teacher.pooled)
    if recipe.features_weight and student.maps:
        loss = loss + recipe.features_weight * map_losses(student.maps, teacher.maps, channel_dim=2)
    return loss


def map_losses(maps: Sequence[Tensor], expected: Sequence[Tensor], channel_dim: int = 1) -> Tensor:
    """Distance of feature maps to those of a teacher. The loss of an image does not depend on the other images.

    The squared distance relative to the variance of the channel within the image, because otherwise the loss would be
    dominated by a few channels that vary much more than all others. Mean over cells, channels and depths.

    Args:
        maps: For each depth (B, D, h, w), or (B, N, D) with ``channel_dim=2``.
        expected: Maps of the teacher, of the same shapes.
        channel_dim: Dimension of the channels.

    Returns:
        (B,).
    """
    distances = []
    for prediction, target in zip(maps, expected, strict=True):
        cells = [dim for dim in range(1, target.ndim) if dim != channel_dim]
        variance = target.float().var(cells, keepdim=True)
        # A lower bound, so that channels that hardly vary do not dominate the loss.
        variance = torch.maximum(variance, 0.01 * variance.mean(channel_dim, keepdim=True))
        distances.append(((prediction.float() - target.float()).square() / variance).flatten(1).mean(1))
    return torch.stack(distances).mean(0)


def _relative(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance over the variance of the target within each image. (B, ..., D) -> (B,)"""
    prediction, target = prediction.float().flatten(1), target.float().flatten(1)
    return (prediction - target).square().mean(1) / target.var(1).clamp(min=1e-6)
