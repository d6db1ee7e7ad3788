"""Scores by the predicted variance of a network's outputs inside each patch, for detectors and segmenters.

A coarse patch has one token for all its cells, which does no harm where the network's outputs are the same in all of
them: inside a road, a sky, a cell. So the score of a patch is the variance inside it (its *spread*) of the outputs with
nothing merged. It is known only after all blocks; a small network predicts it, trained on unlabelled images
(`aptvit.scorers.learned`).

images ── all 2x patches ── first block ──> tokens ── network ──> log of the predicted spread inside each patch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

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
    glance_of,
    parts_of,
)

__all__ = ["SPREAD_FACTORS", "Answers", "SpreadScorer", "fit_spread", "relative_channels", "spread_of"]

SPREAD_FACTORS = (2, 4, 8)  # sizes of patches whose spread is predicted, in base patches
_SIDE = 16  # side of the crop of a large image that is used for training, in 2x patches

# (B, C, H, W) normalised images -> (B, K, H', W') outputs of a network with nothing merged; a 2x patch covers a whole
# number of the H' x W' places.
Answers = Callable[[Tensor], Tensor]


class SpreadScorer(LearnedScorer):
    """Predicted variance of the network's outputs inside a patch, see `fit_spread`."""

    name = "spread"
    fit_call = "aptvit.fit_spread(model, images, answers)"
    outputs = len(SPREAD_FACTORS)
    reach = 2  # neighbours help to predict the edges in a patch

    def _scores(self, predicted: Tensor, distances: Tensor, factor: int) -> Tensor:
        if factor not in SPREAD_FACTORS:
            raise ValueError(
                f"the spread inside patches of {factor} times the size is not predicted: use up to "
                f"{len(SPREAD_FACTORS) + 1} scales"
            )
        spread = predicted[..., SPREAD_FACTORS.index(factor)].exp()
        return parts_of(spread, distances.shape, factor // 2).mean((2, 4))


def spread_of(answers: Tensor, grid_size: tuple[int, int], factor: int) -> Tensor:
    """Variance of a network's outputs inside each patch, summed over channels.

    Args:
        answers: (B, K, H', W') outputs.
        grid_size: (h, w) base patches; H' and W' are multiples of them, or they of H' and W'.
        factor: Side of the patches in base patches.

    Returns:
        (B, h // factor, w // factor).

    Raises:
        ValueError: If a patch does not cover a whole number of places.
    """
    rows, cols = (side // factor for side in grid_size)
    places = [factor * size / side for size, side in zip(answers.shape[2:], grid_size, strict=True)]
    if any(place != int(place) for place in places):
        raise ValueError(
            f"answers of {tuple(answers.shape[2:])} places do not fit a grid of {grid_size} patches: give maps, or as "
            "many places as there are pixels"
        )
    height, width = map(int, places)
    whole = answers[:, :, : rows * height, : cols * width].float()
    if whole.numel() == 0:
        return whole.new_zeros(len(answers), rows, cols)
    # (B, K, rows, height, cols, width) -> (B, rows, cols)
    return whole.unflatten(3, (cols, width)).unflatten(2, (rows, height)).var((3, 5), correction=0).sum(1)


def relative_channels(maps: Tensor) -> Tensor:
    """Divide each channel by its standard deviation within a map, and all by the root of the number of channels.

    (B, D, h, w) -> (B, D, h, w)
    """
    spread = maps.float().var((2, 3), keepdim=True)
    spread = torch.maximum(spread, 0.01 * spread.mean(1, keepdim=True)).clamp(min=1e-12)
    return maps.float() / (spread * maps.shape[1]).sqrt()


def fit_spread(
    model: GlanceModel,
    images: Images | Iterable[Images],
    answers: Answers,
    *,
    updates: int = 600,
    max_images: int = 1024,
    seed: int = 0,
) -> float:
    """Train the network of ``scorer="spread"`` to predict the variance of outputs, on images without labels.

    Args:
        model: Adapted with ``scorer="spread"``.
        images: (B, C, H, W), a list of (C, H_i, W_i), or an iterable of either; a few hundred images are enough.
        answers: From (B, C, H, W) normalised images to (B, K, H', W') outputs with nothing merged: probabilities of
            classes, or feature maps. Called once for each batch.
        updates: Least number of optimizer steps.
        max_images: Most images to read, mirrored images included.
        seed: Seed of the network, of the order of images, and of the crops that are used for training.

    Returns:
        Share of the Poisson deviance of the spread that is explained on every tenth image, which is held back: 1 is
        perfect.

    Raises:
        ValueError: If the model's scorer is another one, the outputs do not fit the images, or no image holds a 2x
            patch.
    """
    if not isinstance(model.patchifier.scorer, SpreadScorer):
        raise ValueError('this model predicts no spread: adapt(vit, scorer="spread", ...)')
    random = torch.Generator().manual_seed(seed)

    def examples(group: ImageGroup) -> tuple[Tensor, Tensor]:
        mirrored = torch.stack([group.images, group.images.flip(3)], dim=1).flatten(0, 1)
        inputs, spread = _examples(model.packed_encoder, mirrored, answers)
        return _part_of(inputs, spread, random)

    pairs = collect(model, images, examples, max_images)
    scale = torch.cat([spread.flatten(0, 2) for _, spread in pairs]).nanmean(0).nan_to_num(1.0).clamp(min=1e-12)
    epochs = math.ceil(updates / math.ceil(sum(len(spread) for _, spread in pairs) / 64))
    pairs = [(inputs, spread / scale) for inputs, spread in pairs]
    quality = fit_network(model, pairs, FitOptions(epochs, seed, _deviance, copies=2))
    with torch.no_grad():
        glance = glance_of(model.packed_encoder)
        glance.layers()[-1].add_(scale.log().to(glance.mean))  # undoes the division by the scale
    return quality


def _deviance(guess: Tensor, spread: Tensor) -> Tensor:
    """Half the Poisson deviance of spreads from the exponentials of guesses; 0 where the spread is NaN."""
    target = spread.nan_to_num()
    return torch.where(spread.isnan(), 0.0, guess.exp() - target - target * guess + torch.xlogy(target, target))


def _part_of(inputs: Tensor, spread: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random crop of a large image; targets at its inner edges are NaN, where the network lacks neighbours."""
    for axis in (1, 2):
        side = inputs.shape[axis]
        length = min(side, _SIDE)
        start = int(torch.randint(side - length + 1, (), generator=random))
        inputs, spread = (tensor.narrow(axis, start, length).clone() for tensor in (inputs, spread))
        if start > 0:
            spread.narrow(axis, 0, SpreadScorer.reach).fill_(math.nan)
        if start + length < side:
            spread.narrow(axis, length - SpreadScorer.reach, SpreadScorer.reach).fill_(math.nan)
    return inputs, spread


@torch.no_grad()
def _examples(encoder: Encoder, images: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    """Inputs of the network, and the spread inside the patch of each size around each 2x patch.

    Returns:
        (B, h/2, w/2, inputs), and (B, h/2, w/2, factors) with NaN where there is no complete patch.
    """
    patch_size, normalization = encoder.adapter.patch_size, encoder.normalization
    images = normalization.normalised(images)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    rows, cols = grid[0] // 2, grid[1] // 2
    outputs = answers(images)
    spread = images.new_full((len(images), rows, cols, len(SPREAD_FACTORS)), math.nan, dtype=torch.float32)
    for number, factor in enumerate(SPREAD_FACTORS):
        side = factor // 2
        variance = spread_of(outputs, grid, factor)
        enlarged = variance.repeat_interleave(side, 1).repeat_interleave(side, 2)
        spread[:, : enlarged.shape[1], : enlarged.shape[2], number] = enlarged
    scorer = EmbeddingScorer(encoder.derived.maps_for_scoring)
    distances = scorer.score_images(images, normalization.mean, normalization.std, patch_size, (2,))[2]
    return glance_inputs(encoder, images, distances), spread
