"""How much faster a step of training is than the uniform model's, measured before a training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.measuring.rounds import Ratio, interleaved

__all__ = ["training_speedup"]


def training_speedup(
    uniform: Callable[[], Tensor],
    step: Callable[[], Tensor],
    modules: tuple[nn.Module, ...],
    accelerator: Any,
    rounds: int = 3,
) -> Ratio:
    """Time forward and backward of both, interleaved; no parameter changes.

    Args:
        uniform: The loss of the uniform model.
        step: The loss of the model that is trained; both may share weights.
        modules: The modules that hold the weights; in training mode meanwhile.
        accelerator: For the type to compute in.
        rounds: Interleaved rounds.
    """

    def both_ways(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with accelerator.autocast():
                value = loss()
            value.backward()

        return run

    was_training = [module.training for module in modules]
    states = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in modules]
    try:
        with torch.random.fork_rng():
            runs = [both_ways(loss) for loss in (uniform, step)]
            for module in modules:
                module.train()
            interleaved(runs, 1, accelerator.device)
            return Ratio.of_rounds(*interleaved(runs, rounds, accelerator.device))
    finally:
        for module, mode, state in zip(modules, was_training, states, strict=True):
            module.zero_grad()
            module.train(mode)
            for name, buffer in module.named_buffers():  # batch normalisation has some
                buffer.copy_(state[name])
