"""Counted operations."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from aptvit.measuring.operations import count_flops, countable_attention


def test_operations_of_a_linear_map_forward_and_backward() -> None:
    linear, x = nn.Linear(7, 3), torch.randn(5, 7, requires_grad=True)
    once = 2 * 5 * 7 * 3
    assert count_flops(lambda: linear(x)) == once
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * once  # gradients of the input and of the weight


def test_operations_of_fused_attention_forward_and_backward() -> None:
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    product = 2 * (2 * 3) * 20 * 20 * 8
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    # Backward: the scores once more, and the gradients of v, of the scores, of q and of k.
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


def test_attention_is_made_countable_on_a_gpu_only() -> None:
    model = SimpleNamespace(attention=None)
    with countable_attention(model, "cuda"):
        assert model.attention == "sdpa"
    assert model.attention is None
    with countable_attention(model, "cpu"):
        assert model.attention is None
    with countable_attention(object(), "cuda"):  # a model of another kind stays as it is
        pass
