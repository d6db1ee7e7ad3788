"""Run a host's own block on a packed sequence: its attention calls are intercepted and computed by segments.

A block runs unchanged on (1, T, D). Its calls of ``F.scaled_dot_product_attention`` go to an `AttentionHandler`. A
`torch.overrides.TorchFunctionMode` can intercept any call, but it adds microseconds to each of some fifty calls of
PyTorch in a block, half of the time of a small block. So attention modules that name the function as
``F.scaled_dot_product_attention`` get a subclass (`redirect`) that runs the same code with another ``F`` while a
handler is current. Parameters, names and the behaviour outside of `run_block` stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aptvit.layers.kernels.attention_op import compiled_attention
from aptvit.layers.kernels.drop_images import drop_images
from aptvit.layers.kernels.packed_attention import packed_attention
from aptvit.patching.layout import Packing

__all__ = ["AttentionPlan", "BlockAttention", "Segments", "class_of", "current_handler", "redirect", "run_block"]


@dataclass(frozen=True, eq=False)
class Segments:
    """Query tokens of each segment attend to the key tokens of the same segment, and to no others.

    Attributes:
        queries: The sequences of the queries.
        keys: The sequences of the keys, as many as of queries; the same object where tokens attend to themselves.
    """

    queries: Packing
    keys: Packing

    @property
    def is_dense(self) -> bool:
        """Whether all segments have the same length, so that they are a plain batch."""
        return self.queries.is_dense and self.keys.is_dense


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Which tokens of a packed sequence attend to which keys, in every block.

    Attributes:
        images: Segments of whole images.
        windows: Segments of windows, for blocks that attend inside windows; None without windows.
        key_bias: (S,) bias added to the logits of each key; None for no bias.
        key_index: (S,) index of each key into [cached keys, keys of the tokens]; None for the keys of the tokens.
        cached: For each block and each attention in it, (1, H, C, d) keys and (1, H, C, e) values of an earlier pass;
            None without such a pass.
    """

    images: Segments
    windows: Segments | None = None
    key_bias: Tensor | None = None
    key_index: Tensor | None = None
    cached: list[list[tuple[Tensor, Tensor]]] | None = None

    @classmethod
    def of_tokens(cls, images: Packing, windows: Packing | None = None, bias: Tensor | None = None) -> AttentionPlan:
        """A plan for tokens that attend to the tokens of their own image, or window.

        Args:
            images: The sequences of the images.
            windows: The sequences of the windows; None without windows.
            bias: (T,) bias of each token as a key; None for no bias.
        """
        return cls(Segments(images, images), None if windows is None else Segments(windows, windows), bias)

    @property
    def segments(self) -> tuple[Segments, ...]:
        return (self.images,) if self.windows is None else (self.images, self.windows)

    @property
    def is_batch(self) -> bool:
        """Whether this is the full attention of images of one length, as in a plain batch."""
        return self.windows is None and self.images.is_dense and self.key_bias is None and self.key_index is None


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """The part of an `AttentionPlan` for one block.

    Attributes:
        segments: Which tokens attend to which keys.
        images: The sequences of whole images, for stochastic depth.
        key_bias: As in the plan.
        key_index: As in the plan.
        cached: Keys and values of this block, as in the plan.
        backend: Attention backend; None for the best backend for the tensors.
        record: Tensors of each attention to return: "query", "key", "value".
    """

    segments: Segments
    images: Packing
    key_bias: Tensor | None = None
    key_index: Tensor | None = None
    cached: list[tuple[Tensor, Tensor]] | None = None
    backend: str | None = None
    record: tuple[str, ...] = ()

    @classmethod
    def of_plan(
        cls, plan: AttentionPlan, block: int, windowed: bool, backend: str | None, record: tuple[str, ...]
    ) -> BlockAttention:
        """The part of a plan for block number ``block``, inside windows or not."""
        segments = plan.windows if windowed and plan.windows is not None else plan.images
        cached = None if plan.cached is None else plan.cached[block]
        return cls(segments, plan.images.queries, plan.key_bias, plan.key_index, cached, backend, record)


class AttentionHandler(TorchFunctionMode):
    """Computes the attention calls of one block. As a context, it intercepts them among all calls of PyTorch.

    Args:
        attention: Segments, bias and cached keys of the block.

    Attributes:
        calls: Number of intercepted attention calls.
        recorded: Recorded tensors of these calls, in order.
    """

    def __init__(self, attention: BlockAttention) -> None:
        super().__init__()
        self.attention = attention
        self.calls = 0
        self.recorded: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.answer(*args, **(kwargs or {}))
        if func is F.dropout1d:
            return self.drop(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def answer(self, *args: Any, **kwargs: Any) -> Tensor:
        """Packed attention with the arguments of ``F.scaled_dot_product_attention``. (1, H, T, d) -> (1, H, T, e)"""
        self.calls += 1
        if torch.compiler.is_dynamo_compiling():
            return self._attend(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # modes must not intercept the calls in here
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
        if attn_mask is not None and hasattr(self.attention, "with_mask"):  # of full grids, see encoder/full_grid.py
            return self.attention.with_mask(query, key, value, attn_mask, dropout_p, scale)
        if attn_mask is not None or is_causal:
            raise ValueError("packed attention has no mask: a block that passes one cannot run on packed tokens")
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        plan = self.attention
        named = {"query": query, "key": key, "value": value}
        self.recorded += [named[name] for name in plan.record]
        if plan.cached is not None:
            cached = plan.cached[self.calls - 1]
            key, value = (torch.cat([a.to(b.dtype), b], dim=2) for a, b in zip(cached, (key, value), strict=True))
        if plan.key_index is not None:
            key, value = key.index_select(2, plan.key_index), value.index_select(2, plan.key_index)
        arguments = (query, key, value, plan.segments.queries, plan.segments.keys, plan.key_bias, scale)
        if torch.compiler.is_dynamo_compiling() and dropout_p == 0 and plan.backend is None:
            return compiled_attention(*arguments)
        return packed_attention(*arguments, dropout_p, plan.backend)

    def drop(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Stochastic depth with the arguments of ``F.dropout1d``: drops whole images. (1, T, D) -> (1, T, D)"""
        return drop_images(x, p, self.attention.images)


_current: ContextVar[AttentionHandler | None] = ContextVar("attention_handler", default=None)


def current_handler() -> AttentionHandler | None:
    """The handler of the block that runs in this context; None outside of `run_block`."""
    return _current.get()


@contextmanager
def _handled_by(handler: AttentionHandler) -> Iterator[None]:
    token = _current.set(handler)
    try:
        yield
    finally:
        _current.reset(token)


def run_block(
    block: nn.Module, x: Tensor, arguments: dict[str, Any], attention: BlockAttention | None = None
) -> list[Tensor]:
    """Run one of a host's blocks. This is the unit of compilation and of activation checkpointing.

    Args:
        block: The block.
        x: (1, T, D) packed tokens, or a plain batch (B, L, D).
        arguments: Keyword arguments of the block: rotary embeddings of the tokens.
        attention: Attention of the packed sequence; None for a plain batch.

    Returns:
        The output, as x, and the recorded tensors.

    Raises:
        ValueError: If the block's attention does not go through ``F.scaled_dot_product_attention``, so that images
            would attend to each other.
    """
    if attention is None:  # nothing to intercept: the host's own attention call
        return [block(x, **arguments)]
    expected = getattr(block, "num_redirected", 0)
    if expected and not torch.compiler.is_dynamo_compiling():
        handler = AttentionHandler(attention)
        with _handled_by(handler):
            out = block(x, **arguments)
        if handler.calls == expected:
            return [out, *handler.recorded]
        block.num_redirected = 0  # type: ignore[assignment]  # modules were replaced: intercept all calls from now on
    handler = AttentionHandler(attention)
    with handler:
        out = block(x, **arguments)
    if handler.calls == 0 and not torch.compiler.is_dynamo_compiling():
        raise ValueError(
            f"attention of {type(block).__name__} did not go through scaled_dot_product_attention, so images of a "
            "packed sequence would see each other: set the attention implementation back to 'sdpa'"
        )
    return [out, *handler.recorded]


def redirect(block: nn.Module) -> None:
    """Give a block's attention modules (which have ``fused_attn``) redirected classes, if all of them can have one."""
    modules: list[Any] = [module for module in block.modules() if hasattr(module, "fused_attn")]
    derived: list[Any] = [_derived(type(module)) for module in modules]  # type: ignore[arg-type]
    if modules and all(derived):
        for module, kind in zip(modules, derived, strict=True):
            module.__class__ = kind
        block.num_redirected = len(modules)  # type: ignore[assignment]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module before redirection."""
    return module.original if isinstance(module, _Redirected) else type(module)


class _Redirected:
    """Base of the redirected classes; ``original`` is the class before redirection."""

    original: ClassVar[type[nn.Module]]


def _answer(*args: Any, **kwargs: Any) -> Tensor:
    handler = _current.get()
    assert handler is not None
    return handler.answer(*args, **kwargs)


@cache
def _derived(kind: Any) -> Any:
    """The redirected subclass of a class, or None if its forward does not name ``F.scaled_dot_product_attention``."""
    if issubclass(kind, _Redirected):
        return kind
    plain: Any = kind.forward
    code = getattr(plain, "__code__", None)
    if code is None or "scaled_dot_product_attention" not in code.co_names or plain.__globals__.get("F") is not F:
        return None
    functional = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": _answer})
    names = {**plain.__globals__, "F": functional}
    redirected = FunctionType(code, names, plain.__name__, plain.__defaults__, plain.__closure__)
    redirected.__kwdefaults__ = plain.__kwdefaults__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # In compiled code intercepting all calls costs nothing.
        if torch.compiler.is_dynamo_compiling() or _current.get() is None:
            return plain(self, *args, **kwargs)
        return redirected(self, *args, **kwargs)

    def reduce(self: Any, _protocol: int) -> Any:
        return _rebuilt, (kind,), self.__dict__  # pickle cannot find the subclass by name

    return type(kind.__name__, (kind, _Redirected), {"original": kind, "forward": forward, "__reduce_ex__": reduce})


def _rebuilt(kind: Any) -> Any:
    derived = _derived(kind)
    return derived.__new__(derived)
