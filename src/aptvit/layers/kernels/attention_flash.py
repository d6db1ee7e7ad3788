"""Packed attention by GPU kernels for sequences of different lengths: PyTorch's own, and those of flash-attn."""

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
    """The attention backends of this machine, best first.

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
    """The best backend for these tensors, by device, precision, head size and dropout.

    Args:
        q: (1, H, T, d) queries.
        v: (1, H, S, e) values.
        dropout_p: Dropout of the attention weights.
    """
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] == v.shape[-1] <= 256
    if fits:
        for backend in _cached_backends():
            if backend == "flash_attn" or (backend == "varlen" and dropout_p == 0):
                return backend
    return "sdpa"


def with_bias_as_feature(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a key bias as a feature, 1 in each query and bias / scale in each key: flash kernels take no bias.

    Args:
        q: (1, H, T, d) queries.
        k: (1, H, S, d) keys.
        v: (1, H, S, e) values.
        key_bias: (S,) bias of the logits of each key.
        scale: Factor of the logits.

    Returns:
        Queries, keys and values with 1 to 8 features more, so that d is a multiple of 8.
    """
    num_features = 1 + (-q.shape[-1] - 1) % 8  # kernels need head sizes in steps of 8
    feature = F.pad(q.new_ones(1), (0, num_features - 1))
    bias = ((key_bias / scale)[:, None] * feature).to(k.dtype)[None, :, None]  # (1, S, 1, num_features)
    # In the order in which hosts keep their tokens, (1, T, H, d).
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q = torch.cat([q, feature.expand(*q.shape[:3], num_features)], dim=-1).transpose(1, 2)
    k = torch.cat([k, bias.expand(*k.shape[:3], num_features)], dim=-1).transpose(1, 2)
    return q, k, F.pad(v, (0, num_features))


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
    """Attention inside each segment: queries of segment i attend to keys of segment i.

    Arguments as for `aptvit.layers.kernels.packed_attention.packed_attention`. (1, H, T, d) queries -> (1, H, T, e)

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
        # Kernels need head sizes in steps of 8; zeros change neither the logits nor the other values.
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
