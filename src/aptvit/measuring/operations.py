"""Operations of a call, counted by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["count_flops", "countable_attention"]


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products, convolutions and attention of one call; a multiply and an add are two."""
    # PyTorch 2.11 does not count fused attention on the CPU.
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with counter:
        run()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of one call, from the shapes."""
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


@contextmanager
def countable_attention(model: Any, device: torch.device | str) -> Iterator[None]:
    """Inside, packed attention consists of calls that `count_flops` counts; kernels on CUDA are none of them.

    Args:
        model: An `aptvit.AdaptivePatchTransformer`; a model without ``attention`` stays as it is.
        device: Where it runs.
    """
    if torch.device(device).type != "cuda" or not hasattr(model, "attention"):
        yield
        return
    before, model.attention = model.attention, "sdpa"
    try:
        yield
    finally:
        model.attention = before
