"""What measuring needs: interleaved rounds, operations, memory, and a description of what it ran on."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = [
    "Spread",
    "count_flops",
    "countable_attention",
    "describe_device",
    "describe_environment",
    "interleaved",
    "keep_freed_memory",
    "peak_memory",
    "wait",
]


@dataclass(frozen=True)
class Spread:
    """Ratios of paired rounds.

    Attributes:
        median: The middle one.
        least: The smallest.
        most: The largest.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Ratios of round i of one list to round i of the other.

        Raises:
            ValueError: If the lists do not pair up.
        """
        ratios = [a / b for a, b in zip(above, below, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def wait(device: torch.device | str) -> None:
    """Wait until a device has done its work; the CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Sequence[Callable[[], Any]], rounds: int, device: torch.device | str, first: int = 0
) -> list[list[float]]:
    """Time several ways in turn, so that what disturbs the machine disturbs all of them alike.

    Args:
        runs: The ways. Warm them up before.
        rounds: How often each runs. The order is turned round from one round to the next.
        device: Where they work.
        first: Number of the first round: odd ones go backwards.

    Returns:
        For each way, the seconds of each round.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(first, first + rounds):
        order = range(len(runs))
        for which in order if step % 2 == 0 else reversed(order):
            seconds[which].append(_seconds(runs[which], device))
    return seconds


def _seconds(run: Callable[[], Any], device: torch.device | str) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def count_flops(run: Callable[[], Any]) -> int:
    """Operations of the matrix products, convolutions and attention of one call; a multiply and an add are two."""
    # PyTorch 2.11 does not count fused attention on the CPU.
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with counter:
        run()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of one call, from the shapes."""
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def peak_memory(step: Callable[[], Any], device: torch.device | str) -> int:
    """Bytes that one call has allocated at its peak, beyond what was live when it began.

    On CUDA the allocator's own count; on the CPU the tensors alive after each operator, of an eager (not compiled)
    call. What an operator allocates and frees inside itself is seen on CUDA only.

    Args:
        step: What to run. Run it once or twice before: optimizers allocate their state on the first step.
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


@contextmanager
def countable_attention(model: Any, device: torch.device | str) -> Iterator[None]:
    """Inside, packed attention is made of calls that `count_flops` knows; kernels on CUDA are none of them.

    Args:
        model: An `aptvit.AdaptivePatchTransformer`.
        device: Where it runs.
    """
    asked = model.attention
    if torch.device(device).type == "cuda":
        model.attention = "sdpa"
    try:
        yield
    finally:
        model.attention = asked


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


def describe_device(device: str) -> str:
    """A device in words: the name of a GPU, or the threads of the CPU."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def describe_environment(memory_kept: bool) -> dict[str, str]:
    """Machine and versions, by label.

    Args:
        memory_kept: What `keep_freed_memory` returned, False where it was not called.
    """
    return {
        "allocator": "freed memory is kept (mallopt)" if memory_kept else "as the system has it",
        "machine": f"{_processor()}, {platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": version("timm"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
