"""What a run that is continued must agree on: values by name, compared with those that the run began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["differences", "digest_tensors", "digest_texts"]

_DIGITS = 16  # of a digest


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a text for each value that differs, ``"name: before → now"``.

    Args:
        before: Values of the run so far, also after JSON: tuples and lists are equal.
        now: Values of the run that continues it.
    """
    return [
        f"{name}: {_in_words(before.get(name))} → {_in_words(now.get(name))}"
        for name in {**before, **now}
        if _plain(before.get(name)) != _plain(now.get(name))
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def digest_texts(texts: Iterable[str]) -> str:
    """Digest of texts in their order, in hexadecimal digits."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:_DIGITS]


def digest_tensors(state: Mapping[str, Tensor]) -> str:
    """Digest of the names, types, shapes and values of a state dict, in hexadecimal digits."""
    import torch  # the command line imports this package before anything slow

    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]
