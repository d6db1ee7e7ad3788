"""What a number of tokens costs: operations counted, time measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from aptvit.measuring.timing import Spread, count_flops, interleaved
from aptvit.patching.scoring import CountedScorer, ReadsTwice
from aptvit.patching.selection import Budget

if TYPE_CHECKING:
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["Cost", "flops_of_blocks", "gflops_of_tokens", "time_of_tokens"]

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
    blocks = flops_of_blocks(model, len(model.adapter.blocks))
    per_patch = 2 * model.adapter.patch_weight()[0].numel()
    scorer, factors = model.patchifier.scorer, [1 << scale for scale in range(1, model.num_scales)]
    scoring = scorer.flops(factors) if with_scoring and isinstance(scorer, CountedScorer) else None
    again = scorer.rows_of_second_pass if isinstance(scorer, ReadsTwice) else lambda tokens, _: tokens

    def cost(tokens: np.ndarray, num_patches: int) -> np.ndarray:
        same_for_all = per_patch * num_patches + (scoring(num_patches) if scoring else 0.0)
        return (blocks(again(tokens, num_patches), tokens) + same_for_all) / 1e9

    return cost


def flops_of_blocks(model: AdaptivePatchTransformer, number: int) -> Callable[..., np.ndarray]:
    """Operations of a model's first blocks, as a function of one image's tokens, prefix tokens included.

    Args:
        model: The adaptive model.
        number: Of blocks.

    Returns:
        (tokens, those that they attend to) -> operations; by default they attend to themselves.
    """
    # Linear layers grow with the tokens, attention with their square, nothing else: three points say it all.
    points = (64, 128, 256)
    square, linear, rest = np.polyfit(points, [float(_blocks_flops(model, number, tokens)) for tokens in points], 2)

    def flops(tokens: np.ndarray | float, keys: np.ndarray | float | None = None) -> np.ndarray:
        rows = np.asarray(tokens, dtype=float)
        return (square * np.asarray(rows if keys is None else keys) + linear) * rows + rest

    return flops


def _blocks_flops(model: AdaptivePatchTransformer, number: int, tokens: int) -> int:
    rotation = model.adapter.rotation_table((1, tokens))
    if rotation is not None:
        rotation = torch.empty(*rotation.shape[:-2], tokens, rotation.shape[-1], device="meta")
    arguments = model.adapter.block_arguments(rotation)
    x = torch.empty(1, tokens, model.adapter.embed_dim, device="meta")
    total = 0
    with torch.no_grad():
        for block, its in list(zip(model.adapter.blocks, arguments, strict=True))[:number]:
            total += count_flops(partial(_on_meta, block, x, its))
    return total


def _on_meta(block: nn.Module, x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    without_data = {name: torch.empty_like(value, device="meta", dtype=x.dtype) for name, value in state.items()}
    return torch.func.functional_call(block, without_data, (x,), arguments)


def time_of_tokens(model: AdaptivePatchTransformer, images: Tensor, rounds: int = 3) -> Cost:
    """Time of one image as a share of the uniform model's: measured at several numbers of tokens, interpolated between.

    Each number of tokens runs interleaved with the model that merges nothing, so that a machine whose speed drifts does
    not bend the curve.

    Args:
        model: The adaptive model. Its budget is put back afterwards.
        images: (B, C, H, W) images to measure with.
        rounds: Timed rounds for each number of tokens.
    """
    before, device = model.budget, str(images.device)
    grid_size = (images.shape[2] // model.patch_size, images.shape[3] // model.patch_size)
    num_patches = math.prod(grid_size)

    def run(budget: Budget) -> None:
        model.budget = budget
        model(images)

    points: dict[int, float] = {}
    uniform = Budget(keep=1.0)
    try:
        with torch.inference_mode():
            for share in _shares(model.num_scales, grid_size):
                budget = Budget(keep=share)
                model.budget = budget
                length = model.layout(images).max_seqlen
                runs = (partial(run, uniform), partial(run, budget))
                interleaved(runs, 1, device)  # warm-up
                whole, part = interleaved(runs, rounds, device)
                points[length] = Spread.of_ratios(part, whole).median
    finally:
        model.budget = before
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
