"""What is learned: classes, or to answer and to see as the uniform model did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.patching.layout import PatchLayout
from aptvit.training.recipe import Recipe

__all__ = ["Learner", "Seen", "distillation_loss", "label_loss", "map_losses"]


@dataclass(frozen=True)
class Seen:
    """What a model makes of images.

    Attributes:
        logits: (B, classes).
        pooled: (B, D) features that the classifier reads.
        maps: For each depth (B, N, D): features at each base cell.
    """

    logits: Tensor
    pooled: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class Learner(nn.Module):
    """A model of timm's protocol, asked for all that an objective compares in one forward pass.

    Args:
        model: Uniform, adaptive or reduced in another way.
        depths: Blocks whose feature maps are wanted.
        with_features: Whether pooled features are wanted.
    """

    def __init__(self, model: Any, depths: Sequence[int] = (), with_features: bool = False) -> None:
        super().__init__()
        self.model = model
        self.depths, self.with_features = list(depths), with_features or bool(depths)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Seen:
        """Images (B, C, H, W), normalised."""
        model, known = self.model, {} if layout is None else {"layout": layout}
        if not self.with_features:
            return Seen(model(images, **known))
        maps: Sequence[Tensor] = ()
        if self.depths:
            features, maps = model.forward_intermediates(images, self.depths, norm=True, output_fmt="NLC", **known)
        else:
            features = model.forward_features(images, **known)
        pooled = model.forward_head(features, pre_logits=True)
        return Seen(model.forward_head(features), pooled, tuple(maps))


def block_depths(model: Any, recipe: Recipe) -> list[int]:
    """Numbers of the blocks that a recipe compares."""
    if not recipe.features_weight:
        return []
    num_blocks = len(model.blocks)
    return sorted({max(1, round(depth * num_blocks)) - 1 for depth in recipe.feature_depths})


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each image. (B, classes), (B, classes) -> (B,)"""
    return -(targets * logits.float().log_softmax(1)).sum(1)


def distillation_loss(student: Seen, teacher: Seen, recipe: Recipe) -> Tensor:
    """How far each image's answer and features are from the teacher's. -> (B,)

    Divergence of the answers at a temperature, times its square, as is usual; the distance between pooled features is
    relative to how much the teacher's vary, and that between maps to how much their channels do (`map_losses`), so that
    no image's loss depends on the others.
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
    """How far maps are from those of a teacher, for each image: no image's loss depends on the others.

    Mean squared distance, relative to how much a channel varies within the image: a few channels vary so much more than
    the rest that they alone would be learned. Mean over depths.

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
        spread = torch.maximum(spread, 0.01 * spread.mean(channel_dim, keepdim=True))  # nor one that hardly varies
        far.append(((guess.float() - target.float()).square() / spread).flatten(1).mean(1))
    return torch.stack(far).mean(0)


def _relative(guess: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance over the variance of the image's own target. (B, ..., D) -> (B,)"""
    guess, target = guess.float().flatten(1), target.float().flatten(1)
    return (guess - target).square().mean(1) / target.var(1).clamp(min=1e-6)
