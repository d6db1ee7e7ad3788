"""Scores by the predicted attention of the class token, and by the change of the embedding.

A coarse patch changes the result where the model attends to it and where its embedding differs from those of its base
patches. The second is a distance in the embedding space (`aptvit.scorers.embedding`). The first is predicted by a small
network (`aptvit.scorers.learned`): the attention of the class token to each patch in the last blocks.

images ── glance ──> log attention of each patch ─────────────────────────────────────┐
       └─ distance of its embedding from the mean of its base patches' ───────────────┴─> scores
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from aptvit.encoder.encoder import Encoder
from aptvit.patching.images import ImageGroup, Images
from aptvit.scorers.embedding import EmbeddingScorer
from aptvit.scorers.learned import (
    FitOptions,
    GlanceModel,
    LearnedScorer,
    collect,
    fit_network,
    glance_inputs,
    parts_of,
    run_blocks,
)

__all__ = ["GlanceScorer", "fit_glance"]


class GlanceScorer(LearnedScorer):
    """Predicted attention to a patch, times the square root of the distance of its embedding (`EmbeddingScorer`)."""

    name = "glance"
    fit_call = "aptvit.fit_glance(model, images)"

    def _scores(self, predicted: Tensor, distances: Tensor, factor: int) -> Tensor:
        # The attention to a larger patch is the sum over its parts.
        attention = parts_of(predicted[..., 0].exp(), distances.shape, factor // 2).sum((2, 4))
        return attention * distances**0.25


@torch.no_grad()
def _examples(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the network, and the logarithm of the attention to each 2x patch in the last third of the blocks."""
    adapter, depth = encoder.adapter, len(encoder.adapter.blocks)
    total: Tensor | float = 0.0
    packing, steps = run_blocks(encoder, images, coarse=False, blocks=depth, record=("query", "key"))
    for step in steps:
        if step.number >= depth - math.ceil(depth / 3):
            query, key = (packing.to_batch(tensor[0]) for tensor in step.recorded[:2])
            total = total + attention_to_patches(query, key, adapter.num_prefix_tokens)
    assert isinstance(total, Tensor)
    mean, std = encoder.normalization.mean, encoder.normalization.std
    scorer = EmbeddingScorer(encoder.derived.maps_for_scoring)
    distances = scorer.score_images(images, mean, std, adapter.patch_size, (2,))[2]
    grid = total.unflatten(1, (images.shape[2] // adapter.patch_size, -1))
    logs = parts_of(grid, distances.shape, 2).sum((2, 4)).clamp(min=1e-8).log()
    return glance_inputs(encoder, images, distances), logs - logs.mean((1, 2), keepdim=True)


def attention_to_patches(query: Tensor, key: Tensor, num_prefix_tokens: int) -> Tensor:
    """Mean attention over heads to each patch: of the class token, or of all tokens if there are no prefix tokens.

    (B, H, L, d) queries and keys -> (B, patches)
    """
    query = query[:, :, :1] if num_prefix_tokens else query
    logits = query.float() @ key.float().transpose(2, 3) * query.shape[-1] ** -0.5
    return logits.softmax(-1).mean((1, 2))[:, num_prefix_tokens:]


def fit_glance(
    model: GlanceModel,
    images: Images | Iterable[Images],
    *,
    epochs: int = 15,
    max_images: int = 4096,
    seed: int = 0,
) -> float:
    """Train the network of ``scorer="glance"`` to predict the host's attention, on images without labels.

    The host's weights are not changed.

    Args:
        model: Adapted with ``scorer="glance"``.
        images: (B, C, H, W), a list of (C, H_i, W_i), or an iterable of either; a few hundred images, or random crops
            of images, are enough.
        epochs: Passes over the images; the host runs once for each image.
        max_images: Most images to read.
        seed: Seed of the network and of the order of images.

    Returns:
        Share of the variance of the log attention that is predicted on every tenth image, which is held back: 1 is
        perfect.

    Raises:
        ValueError: If the model's scorer is another one, or no image holds a 2x patch.
    """
    if not isinstance(model.patchifier.scorer, GlanceScorer):
        raise ValueError('this model has no glance: adapt(vit, scorer="glance", ...)')

    def examples(group: ImageGroup) -> tuple[Tensor, Tensor]:
        inputs, logs = _examples(model.packed_encoder, group.images)
        return inputs, logs[..., None]

    return fit_network(model, collect(model, images, examples, max_images), FitOptions(epochs, seed, _centred))


def _centred(guess: Tensor, logs: Tensor) -> Tensor:
    """Squared errors of logarithms, up to a constant for each image."""
    return (guess - guess.mean((1, 2), keepdim=True) - logs).square()
