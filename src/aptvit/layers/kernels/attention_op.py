"""Packed attention as an operator for torch.compile, which reads the lengths at run time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aptvit.layers.kernels.packed_attention import packed_attention
from aptvit.patching.layout import Packing

__all__ = ["compiled_attention"]


def compiled_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, key_bias: Tensor | None, scale: float | None
) -> Tensor:
    """`packed_attention` as one opaque operator: no graph break, and no recompilation for other lengths.

    Arguments as for `aptvit.layers.kernels.packed_attention.packed_attention`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lengths = (None, None) if keys is queries else (keys.cu_seqlens, keys.lengths_cpu)
    return torch.ops.aptvit.packed_attention(
        q, k, v, queries.cu_seqlens, queries.lengths_cpu, *lengths, key_bias, scale
    )


def _packings(
    cu_seqlens: Tensor, lengths_cpu: Tensor, key_cu_seqlens: Tensor | None, key_lengths_cpu: Tensor | None
) -> tuple[Packing, Packing]:
    """Sequences of queries and of keys."""
    *seqlens, longest = lengths_cpu.tolist()
    queries = Packing(seqlens, cu_seqlens, longest, lengths_cpu, len(set(seqlens)) <= 1)
    if key_cu_seqlens is None or key_lengths_cpu is None:
        return queries, queries
    *seqlens, longest = key_lengths_cpu.tolist()
    return queries, Packing(seqlens, key_cu_seqlens, longest, key_lengths_cpu, len(set(seqlens)) <= 1)


@torch.library.custom_op("aptvit::packed_attention", mutates_args=())
def _packed_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths_cpu: Tensor,
    key_cu_seqlens: Tensor | None,
    key_lengths_cpu: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    queries, keys = _packings(cu_seqlens, lengths_cpu, key_cu_seqlens, key_lengths_cpu)
    # Compiled code may run where attention calls are intercepted; the calls in here must not be.
    with torch._C.DisableTorchFunction():
        out = packed_attention(q, k, v, queries, keys, key_bias, scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the memory order that the shape function promises


@_packed_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *lengths_and_scale: Any) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


@torch.library.custom_op("aptvit::packed_attention_backward", mutates_args=())
def _packed_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths_cpu: Tensor,
    key_cu_seqlens: Tensor | None,
    key_lengths_cpu: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys = _packings(cu_seqlens, lengths_cpu, key_cu_seqlens, key_lengths_cpu)
    # Autograd is disabled inside an operator; torch.func.vjp works there.
    with torch._C.DisableTorchFunction():
        result: Any = torch.func.vjp(lambda q, k, v: packed_attention(q, k, v, queries, keys, key_bias, scale), q, k, v)
        dq, dk, dv = result[1](grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_packed_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *lengths_and_scale: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grads = torch.ops.aptvit.packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None, None, None, None, None)


_packed_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
