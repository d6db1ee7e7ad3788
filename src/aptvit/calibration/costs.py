"""What a number of tokens costs: operations counted, time measured; and which merges a threshold makes."""

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

    Blocks are counted with PyTorch's counter on tensors without data; pixels are all embedded once, in patches of
    whatever size, so the embedding costs what it costs the uniform model. Scorers that look through the host's eyes
    count; heads are left out.

    Args:
        model: The adaptive model.
        with_scoring: False for what the host itself does with so many tokens.

    Raises:
        ValueError: If it has windows: what their attention costs depends on where its tokens are.
    """
    if model.window_size is not None:
        raise ValueError(
            f"operations are not a function of the tokens with windows of {model.window_size} patches: ask for keep="
        )
    blocks = flops_of_blocks(model.adapter, len(model.adapter.blocks))
    per_patch = 2 * model.embed_dim * model.adapter.in_chans * model.patch_size**2
    scorer, factors = model.patchifier.scorer, [1 << scale for scale in range(1, model.num_scales)]
    scoring = scorer.flops(factors) if with_scoring and isinstance(scorer, CountedScorer) else None
    again = getattr(scorer, "tokens_of_second_pass", lambda tokens, _: tokens)

    def cost(tokens: np.ndarray, num_patches: int) -> np.ndarray:
        same_for_all = per_patch * num_patches + (scoring(num_patches) if scoring else 0.0)
        return (blocks(again(tokens, num_patches), tokens) + same_for_all) / 1e9

    return cost


def merge_costs(scores: Mapping[int, Tensor], num_images: int) -> Tensor:
    """Below which threshold, the same for all scales, each merge happens; in no order.

    A 2x patch is merged where its own score or that of a coarser patch around it lies below: coarser wins.

    Args:
        scores: For factor 2^i, (B, h // 2^i, w // 2^i) scores.
        num_images: B.

    Returns:
        (B, merges): each image loses three tokens for each entry below the threshold.
    """
    costs: list[Tensor] = []
    for factor in sorted(scores, reverse=True):
        cost = scores[factor].float()
        if costs:
            cost = cost.clone()
            around = costs[-1].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            covered = cost[:, : around.shape[1], : around.shape[2]]
            covered.copy_(torch.minimum(covered, around))
        costs.append(cost)
    return torch.cat([cost.flatten(1) for cost in costs], dim=1) if costs else torch.zeros(num_images, 0)


def time_of_tokens(model: AdaptivePatchTransformer, images: Tensor, rounds: int = 3) -> Cost:
    """Time of one image as a share of the uniform model's: measured at several numbers of tokens, interpolated between.

    Each number of tokens runs interleaved with the model that merges nothing, so that a machine whose speed drifts does
    not bend the curve.

    Args:
        model: The adaptive model.
        images: (B, C, H, W) images to measure with.
        rounds: Timed rounds for each number of tokens.
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
    """Shares to measure at, down to the least that these scales reach."""
    merges = sum((grid_size[0] >> i) * (grid_size[1] >> i) for i in range(1, num_scales))
    least = 1 - 3 * merges / math.prod(grid_size)
    return [share for share in (1.0, 0.85, 0.7, 0.55, 0.4, 0.28, 0.15) if share > least] + [least] * (least < 1)
