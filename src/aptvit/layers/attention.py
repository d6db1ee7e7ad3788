"""Attention inside each image of a packed sequence, and which backend computes it.

A host's blocks run untouched on (1, T, D). Where all of them meet, in ``F.scaled_dot_product_attention``, a packed
sequence is cut into its runs:

    with packed(packing):           # (1, H, T, d): every token attends to its own run only
        for block in blocks:
            x = block(x)

`run_block` does the same, and faster where it can be told beforehand which modules attend (`aptvit.layers.interception`).
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from itertools import repeat
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aptvit.layers.interception import answered_by, answering, num_redirected
from aptvit.patching.layout import Packing

__all__ = ["Backend", "PackedDropPath", "available_backends", "packed", "packed_attention", "run_block", "run_inside"]

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


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
    keys: Packing | None = None,
) -> Tensor:
    """Scaled dot-product attention in which each run of the packed sequence sees itself only.

    Args:
        q: (1, H, T, d) queries.
        k: (1, H, S, d) keys, S = T unless they have runs of their own.
        v: (1, H, S, e) values.
        packing: The runs, and the bias of their keys if there is one.
        scale: Factor of the logits, 1 / sqrt(d) by default.
        dropout_p: Dropout of the attention weights.
        backend: One of `available_backends`; by default the best that takes these tensors.
        keys: Runs of the keys, one for each of the queries', and their bias; by default they are the queries'.

    Returns:
        (1, H, T, e).

    Raises:
        ValueError: If the tensors do not hold exactly the packed tokens, or the backend does not exist.
    """
    if torch.compiler.is_compiling() and dropout_p == 0 and backend is None:
        # One opaque operator: no graph break, and new lengths are new data, not a new graph.
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        its = (None, None, packing.key_bias) if keys is None else (keys.cu_seqlens, keys.lengths_cpu, keys.key_bias)
        return torch.ops.aptvit.packed_attention(q, k, v, packing.cu_seqlens, packing.lengths_cpu, *its, scale)
    keys = packing if keys is None else keys
    if q.shape[0] != 1 or q.shape[2] != packing.num_tokens or not k.shape[2] == v.shape[2] == keys.num_tokens:
        raise ValueError(
            f"attention over {tuple(q.shape)} queries and {tuple(k.shape)} keys does not match a packed sequence of "
            f"{packing.num_tokens} tokens" + (f" beside {keys.num_tokens}" if keys is not packing else "")
        )
    if keys.key_bias is not None and q.is_cuda:
        return _biased(q, k, v, packing, keys, scale, dropout_p, backend)
    # Runs of one length are a plain batch, for which PyTorch has its fastest kernels.
    is_batch = packing.is_dense and keys.is_dense
    backend = backend or ("sdpa" if is_batch else choose_backend(q, v, dropout_p))
    if backend == "sdpa":
        return _sdpa(q, k, v, packing, keys, scale, dropout_p)
    if backend in get_args(Backend):
        return _flash(q, k, v, packing, keys, scale, dropout_p, backend)
    raise ValueError(f"unknown attention backend {backend!r}: use one of {', '.join(available_backends())}")


def _biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    keys: Packing,
    scale: float | None,
    dropout_p: float,
    backend: Backend | None,
) -> Tensor:
    """With one feature more, 1 in each query and the bias in each key: fast kernels of a GPU take no bias."""
    assert keys.key_bias is not None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dim_v, more = v.shape[-1], 1 + (-q.shape[-1] - 1) % 8  # kernels want head sizes in steps of 8
    first = F.pad(q.new_ones(1), (0, more - 1))
    its = ((keys.key_bias / scale)[:, None] * first).to(k.dtype)[None, :, None]  # (1, T, 1, more)
    # In the order in which hosts keep their tokens, (1, T, H, d).
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q = torch.cat([q, first.expand(*q.shape[:3], more)], dim=-1)
    k = torch.cat([k, its.expand(*k.shape[:3], more)], dim=-1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, F.pad(v, (0, more))))
    out = packed_attention(q, k, v, packing.biased(None), scale, dropout_p, backend, keys.biased(None))
    return out[..., :dim_v]


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, keys: Packing, scale: float | None, dropout_p: float
) -> Tensor:
    # (1, H, T, d) -> (1, T, H, d), the order in which hosts keep their tokens: cutting it is free, and so is joining.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    bias = None if keys.key_bias is None else keys.key_bias.to(q.dtype)[None, None, None]
    if packing.is_dense and keys.is_dense:
        batch = [(len(runs.seqlens), runs.seqlens[0]) for runs in (packing, keys, keys)]
        q, k, v = (t[0].unflatten(0, its).transpose(1, 2) for t, its in zip((q, k, v), batch, strict=True))
        mask = None if bias is None else bias.reshape(len(k), 1, 1, -1)  # of (B, H, L, d) queries
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention run by run has its lengths fixed in a CUDA graph: use varlen or flash_attn")
    outs, masks = [], repeat(None) if bias is None else bias.split(keys.seqlens, dim=3)
    runs_of_keys = (t.split(keys.seqlens, dim=1) for t in (k, v))
    for mask, *run in zip(masks, q.split(packing.seqlens, dim=1), *runs_of_keys, strict=bias is not None):
        if run[0].shape[1] == 0:  # nothing was left to pad
            continue
        one, its_k, its_v = (t.transpose(1, 2) for t in run)  # (1, H, L, d)
        out = F.scaled_dot_product_attention(one, its_k, its_v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1).transpose(1, 2)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    keys: Packing,
    scale: float | None,
    dropout_p: float,
    backend: Backend,
) -> Tensor:
    head_dim = q.shape[-1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, H, d)
    if pad := -head_dim % 8:
        # Kernels want head sizes in steps of 8; zeros change neither the logits nor the rest of the values.
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))
    runs = packing.cu_seqlens, keys.cu_seqlens, packing.max_seqlen, keys.max_seqlen
    out: Any
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, *runs, scale=scale)
    else:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(q, k, v, *runs, dropout_p=dropout_p, softmax_scale=scale)
    return out[..., :head_dim].transpose(0, 1)[None]


class packed(TorchFunctionMode):
    """Inside, attention and `PackedDropPath` treat (1, T, D) as the runs of a packed sequence.

    Args:
        packing: The runs that attention stays in.
        backend: Attention backend; by default the best for the tensors at hand.
        images: Runs of whole images, where attention stays in windows; by default the same.

    Attributes:
        caught: How often attention came by.
    """

    def __init__(self, packing: Packing, backend: Backend | None = None, images: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing
        self.backend = backend
        self.images = packing if images is None else images
        self.caught = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            if torch.compiler.is_compiling():
                self.caught += 1
                return self._attend(*args, **(kwargs or {}))
            return self.answer(*args, **(kwargs or {}))
        if func is F.dropout1d:
            return self.drop_runs(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def answer(self, *args: Any, **kwargs: Any) -> Tensor:
        """What ``F.scaled_dot_product_attention`` gives here."""
        self.caught += 1
        with torch._C.DisableTorchFunction():  # an outer `packed` must not catch what happens in here
            return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("packed attention has no mask: a block that wants one cannot run on packed tokens")
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return self.attend(query, key, value, scale, dropout_p)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout_p: float) -> Tensor:
        """What the rows of the sequence see. (1, H, T, d) -> (1, H, T, d)"""
        return packed_attention(query, key, value, self.packing, scale, dropout_p, self.backend)

    def drop_runs(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Images at random, all rows of each. (1, T, D) -> (1, T, D)"""
        keep = x.new_empty(self.images.cu_seqlens.shape[0] - 1).bernoulli_(1 - p)
        if p < 1:
            keep = keep / (1 - p)
        return x * keep[self.images.run_of_token(x.shape[1])][None, :, None]


def run_block(
    block: nn.Module,
    x: Tensor,
    arguments: dict[str, Any],
    packing: Packing | None,
    backend: Backend | None = None,
    images: Packing | None = None,
) -> Tensor:
    """Run one of a host's blocks; what is compiled, and what is run again by checkpointing.

    Args:
        block: The block.
        x: (1, T, D) packed tokens, or a plain batch (B, L, D).
        arguments: Rotary embeddings of the rows, by the name that the block takes them under.
        packing: Runs of the packed sequence; None for a plain batch.
        backend: Attention backend.
        images: Runs of whole images, where ``packing`` is of windows.

    Raises:
        ValueError: If the block's attention does not go through ``F.scaled_dot_product_attention``: images would have
            seen each other.
    """
    if packing is None:  # nothing to catch: the host's own attention call
        return block(x, **arguments)
    return run_inside(packed(packing, backend, images), block, x, arguments)


def run_inside(mode: packed, block: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Run a block on (1, T, D) tokens whose attention a mode decides; its other arguments are those of `run_block`.

    Raises:
        ValueError: As for `run_block`.
    """
    asks = num_redirected(block)
    if asks and not torch.compiler.is_compiling():
        with answered_by(mode):
            out = block(x, **arguments)
        if mode.caught == asks:
            return out
        block.num_redirected = 0  # type: ignore[assignment]  # some were replaced: from now on all calls are watched
        mode.caught = 0
    with mode:
        out = block(x, **arguments)
    if not (torch.compiler.is_compiling() or mode.caught):
        raise ValueError(
            f"attention of {type(block).__name__} did not go through scaled_dot_product_attention, so images of a "
            "packed sequence would see each other: set the attention implementation back to 'sdpa'"
        )
    return out


class PackedDropPath(nn.Module):
    """Stochastic depth per image of a packed sequence.

    Args:
        drop_prob: Probability that an image skips the branch.
        scale_by_keep: Divide what is kept by the probability of keeping it.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D), inside `packed`."""
        if not self.training or self.drop_prob == 0:
            return x
        who = None if torch.compiler.is_compiling() else answering()
        # PyTorch's name for dropping a whole channel at once; `packed` knows that the channels here are images.
        drop = who.drop_runs if isinstance(who, packed) else F.dropout1d
        x = drop(x, self.drop_prob)
        return x if self.scale_by_keep else x * (1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


# What torch.compile sees of packed attention: an operator that reads the lengths when it runs.


def _packings(
    cu_seqlens: Tensor,
    lengths_cpu: Tensor,
    key_cu_seqlens: Tensor | None,
    key_lengths_cpu: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Packing, Packing]:
    """Of queries and of keys."""
    *seqlens, longest = lengths_cpu.tolist()
    packing = Packing(seqlens, cu_seqlens, longest, lengths_cpu, key_bias)
    if key_cu_seqlens is None or key_lengths_cpu is None:
        return packing, packing
    *seqlens, longest = key_lengths_cpu.tolist()
    return packing, Packing(seqlens, key_cu_seqlens, longest, key_lengths_cpu, key_bias)


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
    packing, keys = _packings(cu_seqlens, lengths_cpu, key_cu_seqlens, key_lengths_cpu, key_bias)
    # Compiled code may run inside `packed`, which must not catch what happens in here.
    with torch._C.DisableTorchFunction():
        out = packed_attention(q, k, v, packing, scale, keys=keys)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the memory order that the shape function promises


@_packed_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *runs_and_scale: Any) -> Tensor:
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
    packing, keys = _packings(cu_seqlens, lengths_cpu, key_cu_seqlens, key_lengths_cpu, key_bias)
    # Ordinary autograd is off inside an operator; vjp brings its own.
    with torch._C.DisableTorchFunction():
        result: Any = torch.func.vjp(lambda q, k, v: packed_attention(q, k, v, packing, scale, keys=keys), q, k, v)
        dq, dk, dv = result[1](grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_packed_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *runs_and_scale: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    grads = torch.ops.aptvit.packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None, None, None, None, None)


_packed_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
