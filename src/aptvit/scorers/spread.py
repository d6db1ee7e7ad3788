"""Scores by the predicted variance of a network's outputs inside each patch, for detectors and segmenters.

A coarse patch has one token for all its cells, which does no harm where the network's outputs are the same in all of
them: inside a road, a sky, a cell. So the score of a patch is the variance inside it (its *spread*) of the outputs with
nothing merged. It is known only after all blocks; a small network predicts it, trained on unlabelled images
(`aptvit.scorers.sizes`).

images ── all 2x patches ── first block ──> tokens ── network ──> log of the predicted spread inside each patch
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from aptvit.patching.images import Images
from aptvit.scorers.learned import GlanceModel
from aptvit.scorers.sizes import FACTORS, Answers, SizesScorer, fit_sizes

__all__ = ["SpreadScorer", "fit_spread", "spread_of"]


class SpreadScorer(SizesScorer):
    """Predicted variance of the network's outputs inside a patch, see `fit_spread`."""

    name = "spread"
    fit_call = "aptvit.fit_spread(model, images, answers)"


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
    patch_size = model.packed_encoder.adapter.patch_size

    def targets(images: Tensor) -> dict[int, Tensor]:
        outputs = answers(images)
        grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
        return {factor: spread_of(outputs, grid, factor) for factor in FACTORS}

    return fit_sizes(model, images, targets, updates, max_images, seed)
