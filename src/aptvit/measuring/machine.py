"""The machine and the versions of a measurement, and digests of the files that it reads."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision

from aptvit.measuring.memory import keep_freed_memory

__all__ = ["describe_device", "describe_environment", "digest_files", "prepare_machine"]


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


def prepare_machine(device: str) -> dict[str, str]:
    """Keep freed memory where a measurement runs on the CPU; and describe device, machine and versions, by label."""
    return {"device": describe_device(device), **describe_environment(device == "cpu" and keep_freed_memory())}


def digest_files(paths: Iterable[Path]) -> str:
    """Twelve characters that follow from the contents of files; of one that cannot be read, from the name."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError:
            digest.update(path.name.encode())  # reported when it is opened
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
