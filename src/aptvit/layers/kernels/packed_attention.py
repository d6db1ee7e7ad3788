"""Packed attention, by the best implementation for the tensors."""

from __future__ import annotations

import math

from torch import Tensor

from aptvit.layers.kernels import attention_flash, attention_sdpa
from aptvit.patching.layout import Packing

__all__ = ["packed_attention"]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing,
    keys: Packing,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention inside each sequence of a packed batch.

    Args:
        q: (1, H, T, d) queries.
        k: (1, H, S, d) keys.
        v: (1, H, S, e) values.
        queries: The sequences of the queries.
        keys: The sequences of the keys; queries of sequence i attend to keys of sequence i.
        key_bias: (S,) bias added to the logits of each key.
        scale: Factor of the logits, 1 / sqrt(d) by default.
        dropout_p: Dropout of the attention weights.
        backend: One of `attention_flash.available_backends`; by default the best backend for these tensors.

    Returns:
        (1, H, T, e).

    Raises:
        ValueError: If the tensors do not hold exactly the packed tokens, or the backend does not exist.
    """
    if q.shape[0] != 1 or q.shape[2] != queries.num_tokens or not k.shape[2] == v.shape[2] == keys.num_tokens:
        raise ValueError(
            f"attention over {tuple(q.shape)} queries and {tuple(k.shape)} keys does not match a packed sequence of "
            f"{queries.num_tokens} tokens" + (f" beside {keys.num_tokens}" if keys is not queries else "")
        )
    if queries.num_tokens == 0:
        return v[:, :, :0]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if key_bias is not None and q.is_cuda:
        q, k, padded_v = attention_flash.with_bias_as_feature(q, k, v, key_bias, scale)
        return packed_attention(q, k, padded_v, queries, keys, None, scale, dropout_p, backend)[..., : v.shape[-1]]
    # Sequences of one length are a plain batch, for which PyTorch has its fastest kernels.
    if backend == "sdpa" or (backend is None and ((queries.is_dense and keys.is_dense) or not q.is_cuda)):
        return attention_sdpa.attend(q, k, v, queries, keys, key_bias, scale, dropout_p)
    return attention_flash.attend(q, k, v, queries, keys, scale, dropout_p, backend)
