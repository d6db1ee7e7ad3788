"""How much faster a step of training is than the uniform model's, measured before a training starts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from aptvit.measure import Spread, interleaved

__all__ = ["training_speedup"]


def training_speedup(uniform: Any, model: Any, images: Tensor, accelerator: Any, rounds: int = 3) -> Spread:
    """Forward and backward of both, interleaved; nothing is learned from it.

    Args:
        uniform: The uniform model.
        model: The other one; they may share weights.
        images: (B, C, H, W), normalised.
        accelerator: For the type to compute in.
        rounds: Interleaved rounds.
    """

    def step(which: Any) -> None:
        with accelerator.autocast():
            loss = which(images).float().square().mean()
        loss.backward()

    was_training = [which.training for which in (uniform, model)]
    try:
        with torch.random.fork_rng():
            runs = [partial(step, which.train()) for which in (uniform, model)]
            interleaved(runs, 1, images.device)
            return Spread.of_ratios(*interleaved(runs, rounds, images.device))
    finally:
        for which, mode in zip((uniform, model), was_training, strict=True):
            which.zero_grad()
            which.train(mode)
