"""Operations and time as functions of the number of tokens, and the thresholds at which merges happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aptvit.encoder.costs import flops_of_blocks
from aptvit.measuring.rounds import Ratio, interleaved
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.scoring import CountedScorer

__all__ = ["Cost", "gflops_of_tokens", "merge_costs", "time_of_tokens"]

# Cost of one image as a function of (its tokens, prefix tokens included; patch tokens of its uniform grid).
Cost = Callable[[np.ndarray, int], np.ndarray]


def gflops_of_tokens(model: AdaptivePatchTransformer, with_scoring: bool = True) -> Cost:
    """Billions of operations of one image, a multiplication and an addition counted as two.

    Blocks are counted with PyTorch's counter on meta tensors. Each pixel is embedded once, in a patch of any size, so
    the embedding costs as much as the uniform model's. Scorers count if they report their operations
    (`aptvit.patching.scoring.CountedScorer`); heads do not count.

    Args:
        model: The adaptive model.
        with_scoring: Whether the scorer counts.

    Returns:
        (tokens, prefix tokens included; patch tokens of the uniform grid) -> GFLOPs.

    Raises:
        ValueError: If the model has windows, whose operations depend on the positions of tokens.
    """
    if model.window_size is not None:
        raise ValueError(
            f"operations are not a function of the tokens with windows of {model.window_size} patches: ask for keep="
        )
    blocks = flops_of_blocks(model.adapter, len(model.adapter.blocks))
    per_patch = 2 * model.embed_dim * model.adapter.in_chans * model.patch_size**2
    scorer, factors = model.patchifier.scorer, [1 << scale for scale in range(1, model.num_scales)]
    scoring = scorer.flops(factors) if with_scoring and isinstance(scorer, CountedScorer) else None
    tokens_of_second_pass = getattr(scorer, "tokens_of_second_pass", lambda tokens, _: tokens)

    def cost(tokens: np.ndarray, num_patches: int) -> np.ndarray:
        constant = per_patch * num_patches + (scoring(num_patches) if scoring else 0.0)
        return (blocks(tokens_of_second_pass(tokens, num_patches), tokens) + constant) / 1e9

    return cost


def merge_costs(scores: Mapping[int, Tensor], num_images: int) -> Tensor:
    """The threshold, the same for all scales, above which each merge happens; unsorted.

    A patch is merged if its own score or that of a coarser patch around it is below the threshold.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores.
        num_images: B.

    Returns:
        (B, merges): an image loses three tokens for each of its entries below a threshold.
    """
    costs: list[Tensor] = []
    for factor in sorted(scores, reverse=True):
        cost = scores[factor].float()
        if costs:
            cost = cost.clone()
            enlarged = costs[-1].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            covered = cost[:, : enlarged.shape[1], : enlarged.shape[2]]
            covered.copy_(torch.minimum(covered, enlarged))
        costs.append(cost)
    return torch.cat([cost.flatten(1) for cost in costs], dim=1) if costs else torch.zeros(num_images, 0)


def time_of_tokens(model: AdaptivePatchTransformer, images: Tensor, rounds: int = 3) -> Cost:
    """Time of one image relative to the uniform model's, measured at several numbers of tokens and interpolated.

    Each number of tokens is timed interleaved with the model that merges nothing, so that a drift of the machine's
    speed cancels.

    Args:
        model: The adaptive model.
        images: (B, C, H, W) images to measure with.
        rounds: Timed rounds for each number of tokens.

    Returns:
        (tokens, prefix tokens included; patch tokens of the uniform grid) -> relative time; a ValueError for another
        grid than that of the images.
    """
    device = str(images.device)
    grid_size = (images.shape[2] // model.patch_size, images.shape[3] // model.patch_size)
    num_patches = math.prod(grid_size)
    points: dict[int, float] = {}
    with torch.inference_mode():
        for share in _shares(model.num_scales, grid_size):
            length = model.layout(images, keep=share).max_seqlen
            runs = (partial(model, images, keep=1.0), partial(model, images, keep=share))
            interleaved(runs, 1, device)  # warm-up
            whole, part = interleaved(runs, rounds, device)
            points[length] = Ratio.of_rounds(part, whole).median
    lengths = sorted(points)

    def cost(tokens: np.ndarray, grid: int) -> np.ndarray:
        if grid != num_patches:
            raise ValueError(
                f"time was measured on images of {num_patches} base patches, one here has {grid}: give images of one "
                "size, or ask for gflops"
            )
        return np.interp(tokens, lengths, [points[length] for length in lengths])

    return cost


def _shares(num_scales: int, grid_size: tuple[int, int]) -> list[float]:
    """Shares to measure at, down to the least share of these scales."""
    merges = sum((grid_size[0] >> i) * (grid_size[1] >> i) for i in range(1, num_scales))
    least = 1 - 3 * merges / math.prod(grid_size)
    return [share for share in (1.0, 0.85, 0.7, 0.55, 0.4, 0.28, 0.15) if share > least] + [least] * (least < 1)
