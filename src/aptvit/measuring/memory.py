"""Memory of calls and models, and an allocator that keeps freed memory."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aptvit.measuring.rounds import wait

__all__ = ["free_memory", "keep_freed_memory", "peak_memory", "storage_bytes"]

_MEMORY_INFO, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def peak_memory(step: Callable[[], Any], device: torch.device | str) -> int:
    """Peak of the memory of a call, in bytes, beyond the memory that was allocated before.

    On CUDA the number of the allocator. On the CPU the size of the live tensors after each operator of an eager (not
    compiled) call; temporary memory inside an operator is counted on CUDA only.

    Args:
        step: The call. Run it once or twice before: optimizers allocate their state on the first step.
        device: Device of the call.
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
    """Sums up the memory of the tensors that operators return, until each tensor is freed.

    The profiler gives the same numbers, but writes to standard error from C++ and takes a trace of every event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._total = 0
        self._sizes: dict[int, int] = {}  # bytes of each live storage; 0 for storages from before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._track((args, kwargs), is_counted=False)
        result = func(*args, **(kwargs or {}))
        self._track(result, is_counted=True)
        self.peak = max(self.peak, self._total)
        return result

    def _track(self, values: Any, is_counted: bool) -> None:
        for tensor in tree_leaves(values):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes() if is_counted else 0
                self._total += self._sizes[storage._cdata]
                weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self._total -= self._sizes.pop(key)


def free_memory(device: torch.device | str) -> int:
    """Bytes that this process can still allocate on a device; on the CPU also within the limit of its container.

    Args:
        device: A CUDA device, or the CPU.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    limit, used = (_read_bytes(_CONTAINER / name) for name in ("memory.max", "memory.current"))
    in_container = None if limit is None or used is None else max(limit - used, 0)
    sizes = [size for size in (_read_bytes(_MEMORY_INFO, "MemAvailable:", 1024), in_container) if size is not None]
    return min(sizes) if sizes else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_bytes(file: Path, name: str = "", unit: int = 1) -> int | None:
    """The number of bytes in the line of a file that begins with a name; None if there is no number."""
    try:
        line = next(line for line in file.read_text().splitlines() if line.startswith(name))
        return int(line.removeprefix(name).split()[0]) * unit
    except (OSError, StopIteration, ValueError, IndexError):  # such as "max"
        return None


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors; a shared storage counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors instead of returning it to the system.

    Page faults otherwise add noise and time to a measurement.

    Returns:
        Whether the allocator is glibc's, and took the settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    settings = ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28))
    return all([mallopt(option, value) == 1 for option, value in settings])
