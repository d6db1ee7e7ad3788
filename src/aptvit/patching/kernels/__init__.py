"""Fast kernels of torch functions. Results may differ from the torch function's in rounding only, which tests check.

Nothing here imports Triton or numba: modules that need them are imported where they are used.

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
    """Whether Triton is installed. The caller checks that tensors are on a device that Triton compiles for."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_numba() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None
