"""Where would a big patch hide what a network says? Foreseen from a glance, for boxes, masks and maps.

A big patch gives one token to all cells that it covers. That does no harm where the network says the same of all of
them: inside a road, a sky, a cell. So the score of a patch is how much the network's own answers, with nothing merged,
vary inside it. They are known only afterwards; the network of a glance (`aptvit.glance`) learns to foresee them, on
pictures without labels.

images ── all 2x patches ── first block ──> tokens ── network ──> log spread of the answers inside each patch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aptvit.embedding_scorer import EmbeddingScorer
from aptvit.glance import GLANCE, ForeseeingScorer, Taught, collect, glance_inputs, parts_of, teach
from aptvit.inputs import ImageGroup, Images

if TYPE_CHECKING:
    from aptvit.model import AdaptivePatchTransformer

__all__ = ["SPREAD_FACTORS", "Answers", "SpreadScorer", "fit_spread", "spread_of"]

SPREAD_FACTORS = (2, 4, 8)  # sizes of which the spread is foreseen, in base patches
_LEAST = 1e-7
_MOST_PATCHES = 256  # of an image that are learned from: neighbours say much the same

# (B, C, H, W) normalised images -> (B, K, H', W') what a network says of each place, nothing merged: H' and W' are such
# that 2x patches are whole numbers of places.
Answers = Callable[[Tensor], Tensor]


class SpreadScorer(ForeseeingScorer):
    """Expected variance of the network's answers inside a patch, see `fit_spread`."""

    name = "spread"
    fit = "aptvit.fit_spread(model, pictures, answers)"

    def _scores(self, foreseen: Tensor, distances: Tensor, factor: int) -> Tensor:
        if factor not in SPREAD_FACTORS:
            raise ValueError(
                f"the spread inside patches of {factor} times the size is not foreseen: use up to "
                f"{len(SPREAD_FACTORS) + 1} scales"
            )
        logs = foreseen[..., SPREAD_FACTORS.index(factor)]
        return parts_of(logs, distances.shape, factor // 2).mean((2, 4)).exp()


def spread_of(answers: Tensor, grid_size: tuple[int, int], factor: int) -> Tensor:
    """Variance of answers inside each patch of a size, summed over what is said.

    Args:
        answers: (B, K, H', W').
        grid_size: (h, w) base patches; H' and W' are multiples of them, or they of H' and W'.
        factor: Side of the patches in base patches.

    Returns:
        (B, h // factor, w // factor).

    Raises:
        ValueError: If a patch is no whole number of places.
    """
    rows, cols = (side // factor for side in grid_size)
    places = [factor * have / side for have, side in zip(answers.shape[2:], grid_size, strict=True)]
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


def fit_spread(
    model: AdaptivePatchTransformer,
    images: Images | Iterable[Images],
    answers: Answers,
    *,
    updates: int = 600,
    max_images: int = 1024,
    seed: int = 0,
) -> float:
    """Teach a model's glance where a network's answers differ from place to place, on pictures without labels.

    Args:
        model: Adapted with ``scorer="spread"``.
        images: A batch, a list, or an iterable of either; a few hundred pictures are enough.
        answers: What the network says of each place of normalised images, nothing merged: probabilities of classes, or
            feature maps. Called once for each batch.
        updates: Steps of the fit, at least.
        max_images: Images to read.
        seed: Seed of the network, of the order, and of the patches that are learned from.

    Returns:
        How well the spread is foreseen on every tenth image, which is held back: 1 is perfectly, 0 not at all.

    Raises:
        ValueError: If the model has no such glance, the answers do not fit the images, or no image holds a 2x patch.
    """
    if not isinstance(model.patchifier.scorer, SpreadScorer):
        raise ValueError('this model foresees no spread: adapt(vit, scorer="spread", ...)')
    random = torch.Generator().manual_seed(seed)

    def examples(group: ImageGroup) -> tuple[Tensor, Tensor]:
        inputs, logs = _examples(model, group.images, answers)
        chosen = torch.randperm(logs.shape[1], generator=random)[:_MOST_PATCHES].to(logs.device)
        return inputs[:, chosen], logs[:, chosen]

    pairs = collect(model, images, examples, max_images)
    middle, width = _statistics(torch.cat([logs.flatten(0, 1) for _, logs in pairs]))
    epochs = math.ceil(updates / math.ceil(sum(len(logs) for _, logs in pairs) / 64))
    alike = [(inputs, (logs - middle) / width) for inputs, logs in pairs]
    quality = teach(model, alike, Taught(epochs, seed, centred=False))
    glance = getattr(model, GLANCE)  # foresees logarithms as they are
    glance.w3.mul_(width[:, None].to(glance.w3))
    glance.b3.mul_(width.to(glance.b3)).add_(middle.to(glance.b3))
    return quality


@torch.no_grad()
def _examples(model: AdaptivePatchTransformer, images: Tensor, answers: Answers) -> tuple[Tensor, Tensor]:
    """What the network reads, and the logarithm of the spread in the patch of each size around each 2x patch.

    Returns:
        (B, n, inputs), and (B, n, factors) with NaN where no whole patch is.
    """
    patchifier = model.patchifier
    images = patchifier.normalised(images)
    grid = (images.shape[2] // model.patch_size, images.shape[3] // model.patch_size)
    rows, cols = grid[0] // 2, grid[1] // 2
    said = answers(images)
    logs = images.new_full((len(images), len(SPREAD_FACTORS), rows, cols), math.nan, dtype=torch.float32)
    for number, factor in enumerate(SPREAD_FACTORS):
        side = factor // 2
        inside = spread_of(said, grid, factor).clamp(min=_LEAST).log()
        around = inside.repeat_interleave(side, 1).repeat_interleave(side, 2)
        logs[:, number, : around.shape[1], : around.shape[2]] = around
    scorer = EmbeddingScorer(model.adapter.patch_weight)
    distances = scorer.score_images(images, patchifier.mean, patchifier.std, model.patch_size, (2,))[2]
    return glance_inputs(model, images, distances), logs.flatten(2).transpose(1, 2)


def _statistics(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what is known. (n, factors) -> (factors,), (factors,)"""
    known = (~logs.isnan()).sum(0).clamp(min=1)
    middle = logs.nan_to_num().sum(0) / known
    return middle, ((logs - middle).nan_to_num().square().sum(0) / known).sqrt().clamp(min=1e-3)
