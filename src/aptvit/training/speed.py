"""Speed-up of a training step over the uniform model, measured before a training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio, interleaved

__all__ = ["training_speedup"]


def training_speedup(
    uniform: Callable[[], Tensor],
    step: Callable[[], Tensor],
    modules: tuple[nn.Module, ...],
    accelerator: Any,
    progress: Progress = silent,
    rounds: int = 3,
) -> Ratio:
    """Time forward and backward passes of two models, interleaved. Parameters and buffers stay unchanged.

    Args:
        uniform: Computes the loss of the uniform model, ().
        step: Computes the loss of the model that is trained, (); both may share weights.
        modules: The modules that hold the weights; set to training mode during the measurement.
        accelerator: accelerate's Accelerator, for the device and the type to compute in.
        progress: Wraps the rounds.
        rounds: Number of interleaved rounds.

    Returns:
        Time of the uniform model over that of the trained model.
    """

    def forward_and_backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with accelerator.autocast():
                value = loss()
            value.backward()

        return run

    was_training = [module.training for module in modules]
    states = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in modules]
    try:
        with torch.random.fork_rng():
            runs = [forward_and_backward(loss) for loss in (uniform, step)]
            for module in modules:
                module.train()
            return Ratio.of_rounds(*interleaved(runs, rounds, accelerator.device, warmup=1, progress=progress))
    finally:
        for module, mode, state in zip(modules, was_training, states, strict=True):
            module.zero_grad()
            module.train(mode)
            for name, buffer in module.named_buffers():  # such as the statistics of batch normalisation
                buffer.copy_(state[name])
