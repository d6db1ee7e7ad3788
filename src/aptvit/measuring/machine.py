"""The machine and the versions of a measurement, and digests of files."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision

from aptvit.measuring.memory import keep_freed_memory

__all__ = ["computes_in_bfloat16", "digest_files", "prepare_machine"]


def prepare_machine(device: str) -> dict[str, str]:
    """Prepare this process for a measurement: on the CPU, freed memory is kept (`keep_freed_memory`).

    Args:
        device: Device of the measurement.

    Returns:
        Device, allocator, machine, threads and versions, by label.
    """
    threads, memory_kept = torch.get_num_threads(), device == "cpu" and keep_freed_memory()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{threads} threads"
    return {
        "device": f"{device} ({name})",
        "allocator": "freed memory is kept (mallopt)" if memory_kept else "as the system has it",
        "machine": f"{_processor()}, {platform.system()} {platform.machine()}",
        "threads": str(threads),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": version("timm"),
    }


_MAX_BYTES = 2**33  # of a file whose content is digested


def computes_in_bfloat16(device: str) -> bool:
    """Return whether a device multiplies bfloat16 by its hardware.

    Others convert to float32 and back: on a CPU without such units a training takes several times as long.

    Args:
        device: Device of the computation.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    return any(value for name, value in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def digest_files(paths: Iterable[Path]) -> str:
    """First twelve hexadecimal digits of a SHA-256 digest of the contents of files.

    A file that cannot be read contributes its name: the error is reported when the file is opened for use. So do pipes
    and devices, which may never end, and files of more than 8 GB.

    Args:
        paths: The files; their order matters.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            if not path.is_file() or path.stat().st_size > _MAX_BYTES:
                raise OSError
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            digest.update(path.name.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
