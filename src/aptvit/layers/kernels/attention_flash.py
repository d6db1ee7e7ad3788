"""Packed attention by the kernels of a GPU that read offsets: PyTorch's own, and those of flash-attn."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.layers.kernels import attention_sdpa
from aptvit.patching.layout import Packing

__all__ = ["Backend", "attend", "available_backends", "choose_backend", "with_bias_as_feature"]

Backend = Literal["sdpa", "varlen", "flash_attn"]


def available_backends() -> list[Backend]:
    """What this machine can use, best first.

    ``varlen`` is PyTorch's own ``torch.nn.attention.varlen``, ``flash_attn`` the package of that name (both CUDA,
    half precision), ``sdpa`` one call of ``F.scaled_dot_product_attention`` per image (everywhere).
    """
    backends: list[Backend] = ["sdpa"]
    if torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0):
        if importlib.util.find_spec("flash_attn") is not None:
            backends.insert(0, "flash_attn")
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            backends.insert(0, "varlen")
    return backends


_cached_backends = cache(available_backends)


def choose_backend(q: Tensor, v: Tensor, dropout_p: float = 0.0) -> Backend:
    """The best backend that takes these tensors: device, precision, head size and dropout decide."""
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= 256
    if fits:
        for backend in _cached_backends():
            if backend == "flash_attn" or (backend == "varlen" and dropout_p == 0):
                return backend
    return "sdpa"


def with_bias_as_feature(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One more feature, 1 in each query and the bias in each key: fast kernels of a GPU take no bias."""
    more = 1 + (-q.shape[-1] - 1) % 8  # kernels want head sizes in steps of 8
    first = F.pad(q.new_ones(1), (0, more - 1))
    bias = ((key_bias / scale)[:, None] * first).to(k.dtype)[None, :, None]  # (1, S, 1, more)
    # In the order in which hosts keep their tokens, (1, T, H, d).
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q = torch.cat([q, first.expand(*q.shape[:3], more)], dim=-1).transpose(1, 2)
    k = torch.cat([k, bias.expand(*k.shape[:3], more)], dim=-1).transpose(1, 2)
    return q, k, F.pad(v, (0, more))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing,
    keys: Packing,
    scale: float,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention inside each segment: queries attend to the keys of the same number.

    Other arguments as for `packed_attention`. (1, H, T, d) queries -> (1, H, T, e)

    Raises:
        ValueError: If the backend does not exist.
    """
    backend = backend or choose_backend(q, v, dropout_p)
    if backend == "sdpa":
        return attention_sdpa.attend(q, k, v, queries, keys, None, scale, dropout_p)
    if backend not in ("varlen", "flash_attn"):
        raise ValueError(f"unknown attention backend {backend!r}: use one of {', '.join(available_backends())}")
    head_dim = q.shape[-1]
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, H, d)
    if pad := -head_dim % 8:
        # Kernels want head sizes in steps of 8; zeros change neither the logits nor the other values.
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))
    lengths = queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen
    out: Any
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, *lengths, scale=scale)
    else:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(q, k, v, *lengths, dropout_p=dropout_p, softmax_scale=scale)
    return out[..., :head_dim].transpose(0, 1)[None]
