"""Operations of a call, counted by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["count_flops", "countable_attention", "mean_gflops"]

_FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def count_flops(run: Callable[[], Any]) -> int:
    """Number of operations of a call: of its matrix products, convolutions and attention, forward and backward.

    Args:
        run: The call. It is run once.

    Returns:
        Operations; a multiplication and an addition are two.
    """
    # PyTorch 2.11 does not count fused attention on the CPU. Formulas get the shapes of the arguments.
    attention: dict[Any, Any] = {
        _FUSED_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        _FUSED_ON_CPU_BACKWARD: lambda grad, *shapes, **_: sdpa_backward_flop_count(grad, *shapes[:3]),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run()
    return counter.get_total_flops()


@contextmanager
def countable_attention(model: Any, device: torch.device | str) -> Iterator[None]:
    """In this context, packed attention consists of operators that `count_flops` counts, which CUDA kernels are not.

    Args:
        model: An `aptvit.AdaptivePatchTransformer`; a model without ``attention`` is not changed.
        device: Device of the model.
    """
    if torch.device(device).type != "cuda" or not hasattr(model, "attention"):
        yield
        return
    before, model.attention = model.attention, "sdpa"
    try:
        yield
    finally:
        model.attention = before


def mean_gflops(model: Any, run: Callable[[Any], Any], batches: Collection[Any], device: str) -> float:
    """Billions of operations per image; a multiplication and an addition are two.

    Args:
        model: The model, see `countable_attention`.
        run: Runs the model on a batch.
        batches: Batches of images.
        device: Device of the model.
    """
    with countable_attention(model, device):
        return sum(count_flops(partial(run, batch)) for batch in batches) / sum(map(len, batches)) / 1e9
