"""Packed attention by ``F.scaled_dot_product_attention``: one call where all lengths are equal, else one a segment."""

from __future__ import annotations

from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.patching.layout import Packing

__all__ = ["attend"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing,
    keys: Packing,
    key_bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention inside each segment: queries of segment i attend to keys of segment i.

    Arguments as for `aptvit.layers.kernels.packed_attention.packed_attention`. (1, H, T, d) queries -> (1, H, T, e)
    """
    # (1, H, T, d) -> (1, T, H, d), the order in which hosts keep their tokens: cutting it is free, and so is joining.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bias = None if key_bias is None else key_bias.to(q.dtype)[None, None, None]
    if queries.is_dense and keys.is_dense:
        q, k, v = (_as_batch(t, packing) for t, packing in ((q, queries), (k, keys), (v, keys)))
        mask = None if bias is None else bias.reshape(len(k), 1, 1, -1)  # of (B, H, L, d) queries
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("sdpa has its lengths fixed in a CUDA graph: use attention='varlen' or 'flash_attn'")
    outs, masks = [], repeat(None) if bias is None else bias.split(keys.seqlens, dim=3)
    pieces = (t.split(packing.seqlens, dim=1) for t, packing in ((q, queries), (k, keys), (v, keys)))
    for mask, *piece in zip(masks, *pieces, strict=bias is not None):
        if piece[0].shape[1] == 0:  # a segment of padding without tokens
            continue
        query, key, value = (t.transpose(1, 2) for t in piece)  # (1, H, L, d)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1).transpose(1, 2)


def _as_batch(tokens: Tensor, packing: Packing) -> Tensor:
    """(1, T, H, d) -> (B, H, L, d), where all sequences have the same length."""
    return tokens[0].unflatten(0, (len(packing.seqlens), packing.seqlens[0])).transpose(1, 2)
