"""Scorers by a predicted quantity of patches of each size, and how their network is trained.

The quantity (a non-negative number for each patch of 2, 4 and 8 base patches) is known only after all blocks. A small
network (`aptvit.scorers.learned`) predicts its logarithm from the host's first block on 2x patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

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

__all__ = ["FACTORS", "Answers", "SizesScorer", "fit_sizes", "relative_channels"]

FACTORS = (2, 4, 8)  # sizes of patches, in base patches
_SIDE = 16  # side of the crop of a large image that is used for training, in 2x patches

# (B, C, H, W) normalised images -> (B, K, H', W') outputs of a network with nothing merged; a 2x patch covers a whole
# number of the H' x W' places.
Answers = Callable[[Tensor], Tensor]


class SizesScorer(LearnedScorer):
    """The predicted quantity of each patch, averaged over the 2x patches inside."""

    name: ClassVar[str]  # of the quantity
    outputs = len(FACTORS)
    reach = 2  # neighbours help to predict the edges in a patch

    def _scores(self, predicted: Tensor, distances: Tensor, factor: int) -> Tensor:
        if factor not in FACTORS:
            raise ValueError(
                f"the {self.name} of patches of {factor} times the size is not predicted: use up to "
                f"{len(FACTORS) + 1} scales"
            )
        values = predicted[..., FACTORS.index(factor)].exp()
        return parts_of(values, distances.shape, factor // 2).mean((2, 4))


def fit_sizes(
    model: GlanceModel,
    images: Images | Iterable[Images],
    targets: Callable[[Tensor], Mapping[int, Tensor]],
    updates: int,
    max_images: int,
    seed: int,
    lengths: Sequence[int] = (),
) -> float:
    """Train the network of a `SizesScorer`, on images without labels, mirrored ones included.

    Args:
        model: The adaptive model.
        images: (B, C, H, W), a list of (C, H_i, W_i), or an iterable of either.
        targets: From (B, C, H, W) normalised images to the quantity of their patches: for each factor
            (B, h // factor, w // factor).
        updates: Least number of optimizer steps.
        max_images: Most images to read, mirrored images included.
        seed: Seed of the network, of the order of images, and of the crops that are used for training.
        lengths: Other numbers of steps to try; the network that is best on held back images is kept.

    Returns:
        Share of the Poisson deviance that is explained on every tenth image, which is held back: 1 is perfect.

    Raises:
        ValueError: If no image holds a 2x patch.
    """
    random = torch.Generator().manual_seed(seed)

    def examples(group: ImageGroup) -> tuple[Tensor, Tensor]:
        mirrored = torch.stack([group.images, group.images.flip(3)], dim=1).flatten(0, 1)
        return part_of(*examples_of(model.packed_encoder, mirrored, targets), random)

    pairs = collect(model, images, examples, max_images)
    scale = torch.cat([truth.flatten(0, 2) for _, truth in pairs]).nanmean(0).nan_to_num(1.0).clamp(min=1e-12)
    pairs = [(inputs, truth / scale) for inputs, truth in pairs]
    per_epoch = math.ceil(sum(len(truth) for _, truth in pairs) / 64)
    glance, best = glance_of(model.packed_encoder), -math.inf
    state: dict[str, Tensor] = {}
    for number in dict.fromkeys((updates, *lengths)):  # without images to hold back, the first
        quality = fit_network(model, pairs, FitOptions(math.ceil(number / per_epoch), seed, deviance, copies=2))
        if not state or quality > best:
            best, state = quality, {name: value.clone() for name, value in glance.state_dict().items()}
    glance.load_state_dict(state)
    with torch.no_grad():
        glance.layers()[-1].add_(scale.log().to(glance.mean))  # undoes the division by the scale
    return best


def relative_channels(maps: Tensor) -> Tensor:
    """Divide each channel by its standard deviation within a map, and all by the root of the number of channels.

    (B, D, h, w) -> (B, D, h, w)
    """
    spread = maps.detach().float().var((2, 3), keepdim=True)
    spread = torch.maximum(spread, 0.01 * spread.mean(1, keepdim=True)).clamp(min=1e-12)
    return maps.float() / (spread * maps.shape[1]).sqrt()


def deviance(guess: Tensor, truth: Tensor) -> Tensor:
    """Half the Poisson deviance from the exponentials of guesses; 0 where the truth is NaN."""
    target = truth.nan_to_num()
    return torch.where(truth.isnan(), 0.0, guess.exp() - target - target * guess + torch.xlogy(target, target))


def part_of(inputs: Tensor, truth: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random crop of a large image; targets at its inner edges are NaN, where the network lacks neighbours."""
    for axis in (1, 2):
        side = inputs.shape[axis]
        length = min(side, _SIDE)
        start = int(torch.randint(side - length + 1, (), generator=random))
        inputs, truth = (tensor.narrow(axis, start, length).clone() for tensor in (inputs, truth))
        if start > 0:
            truth.narrow(axis, 0, SizesScorer.reach).fill_(math.nan)
        if start + length < side:
            truth.narrow(axis, length - SizesScorer.reach, SizesScorer.reach).fill_(math.nan)
    return inputs, truth


@torch.no_grad()
def examples_of(
    encoder: Encoder, images: Tensor, targets: Callable[[Tensor], Mapping[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Inputs of the network, and the quantity of the patch of each size around each 2x patch.

    Args:
        encoder: The adaptive model's encoder.
        images: (B, C, H, W).
        targets: As for `fit_sizes`.

    Returns:
        (B, h/2, w/2, inputs), and (B, h/2, w/2, factors) with NaN where there is no complete patch.
    """
    patch_size, normalization = encoder.adapter.patch_size, encoder.normalization
    images = normalization.normalised(images)
    rows, cols = (side // patch_size // 2 for side in images.shape[2:])
    values = targets(images)
    truth = images.new_full((len(images), rows, cols, len(FACTORS)), math.nan, dtype=torch.float32)
    for number, factor in enumerate(FACTORS):
        side = factor // 2
        enlarged = values[factor].repeat_interleave(side, 1).repeat_interleave(side, 2)
        truth[:, : enlarged.shape[1], : enlarged.shape[2], number] = enlarged
    scorer = EmbeddingScorer(encoder.derived.maps_for_scoring)
    distances = scorer.score_images(images, normalization.mean, normalization.std, patch_size, (2,))[2]
    return glance_inputs(encoder, images, distances), truth
