"""Fast twins of torch functions. The torch function is the oracle: what a twin gives may differ in rounding only.

Nothing here imports Triton or numba: each module that does is imported where it is used.

| module | for |
|---|---|
| `entropy_torch` | any tensor |
| `entropy_triton` | CUDA tensors, where `has_triton` |
| `entropy_numba` | CPU tensors, where `has_numba` |
"""

from __future__ import annotations

import functools
import importlib.util

__all__ = ["has_numba", "has_triton"]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. That a tensor is on a device Triton compiles for is the caller's to check."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None
