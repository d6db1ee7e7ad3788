"""Memory of a call, and of a model; and how the allocator treats what is freed."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aptvit.measuring.rounds import wait

__all__ = ["keep_freed_memory", "peak_memory", "storage_bytes"]


def peak_memory(step: Callable[[], Any], device: torch.device | str) -> int:
    """Bytes that one call allocates at its peak, beyond those that were live when it began.

    On CUDA the allocator's own count; on the CPU the tensors alive after each operator, of an eager (not compiled)
    call. What an operator allocates and frees inside itself is counted on CUDA only.

    Args:
        step: The call. Run it once or twice before: optimizers allocate their state on the first step.
        device: Where it works.
    """
    if torch.device(device).type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        step()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the memory of the tensors that operators make, until each is freed.

    The profiler gives the same numbers, but writes to standard error from C++ and takes a trace of every event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._sizes: dict[int, int] = {}  # bytes of each live storage; 0 for what was there before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._add(tensor, ours=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._add(tensor, ours=True)
        self.peak = max(self.peak, self._now)
        return result

    def _add(self, tensor: Any, ours: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if ours else 0
        self._now += self._sizes[key]
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors; a storage that several share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def keep_freed_memory() -> bool:
    """Tell glibc to keep big temporaries instead of returning them to the system after each use.

    Page faults otherwise add noise, and time, to both sides of a measurement. Returns whether it was possible.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    wanted = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
    return all([mallopt(option, value) == 1 for option, value in wanted])
