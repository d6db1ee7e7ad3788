"""A host's attention modules, whose one call of ``scaled_dot_product_attention`` somebody else answers.

A `torch.overrides.TorchFunctionMode` would do for any block, and takes microseconds for each of the fifty calls of
PyTorch in it: half as long again as a small block itself. So the classes of attention modules that name the function
as ``F.scaled_dot_product_attention`` are derived from: the same code, with another meaning of ``F`` while somebody
answers. Parameters, names and behaviour outside stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Answerer", "answered_by", "answering", "kind_of", "num_redirected", "redirect"]


class Answerer(Protocol):
    """Who answers."""

    def answer(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes the arguments of ``F.scaled_dot_product_attention``."""
        ...


_answering: ContextVar[Answerer | None] = ContextVar("answering", default=None)


def answering() -> Answerer | None:
    """Who answers redirected attention here."""
    return _answering.get()


@contextmanager
def answered_by(who: Answerer) -> Iterator[None]:
    """Inside, redirected attention is answered."""
    token = _answering.set(who)
    try:
        yield
    finally:
        _answering.reset(token)


def redirect(block: nn.Module) -> None:
    """Derive the classes of a block's attention modules, those that have ``fused_attn``, if it can be done for all."""
    attention = [module for module in block.modules() if hasattr(module, "fused_attn")]
    kinds: list[Any] = [type(module) for module in attention]
    derived = [_derived(kind) for kind in kinds]
    if attention and all(derived):
        for module, kind in zip(attention, derived, strict=True):
            module.__class__ = kind
        block.num_redirected = len(attention)  # type: ignore[assignment]


def num_redirected(block: nn.Module) -> int:
    """How many attention modules `redirect` derived: as often somebody is asked, unless they were replaced since."""
    return getattr(block, "num_redirected", 0)


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its library knows it."""
    return module.kind if isinstance(module, _Redirected) else type(module)


class _Redirected:
    """What all derived classes have in common."""

    kind: ClassVar[type[nn.Module]]


def _call(*args: Any, **kwargs: Any) -> Tensor:
    who = _answering.get()
    assert who is not None
    return who.answer(*args, **kwargs)


@cache
def _derived(kind: Any) -> Any:
    """The class with its forward redirected, or None if it calls attention by another name."""
    if issubclass(kind, _Redirected):
        return kind
    plain: Any = kind.forward
    code = getattr(plain, "__code__", None)
    if code is None or "scaled_dot_product_attention" not in code.co_names or plain.__globals__.get("F") is not F:
        return None
    functional = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": _call})
    names = {**plain.__globals__, "F": functional}
    redirected = FunctionType(code, names, plain.__name__, plain.__defaults__, plain.__closure__)
    redirected.__kwdefaults__ = plain.__kwdefaults__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Compiled code has no calls to watch, so there a mode costs nothing.
        if torch.compiler.is_compiling() or _answering.get() is None:
            return plain(self, *args, **kwargs)
        return redirected(self, *args, **kwargs)

    def reduce(self: Any, _protocol: int) -> Any:
        return _again, (kind,), self.__dict__  # a class that was made here cannot be found by its name

    return type(kind.__name__, (kind, _Redirected), {"kind": kind, "forward": forward, "__reduce_ex__": reduce})


def _again(kind: Any) -> Any:
    derived = _derived(kind)
    return derived.__new__(derived)
