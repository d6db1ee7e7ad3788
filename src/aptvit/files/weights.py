"""Weights in files that others wrote: tensors only, never code."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from aptvit.files.regular import open_regular
from aptvit.files.text import printable

__all__ = ["check_checkpoint", "read_checkpoint", "read_weights", "shapes_of_weights"]


def shapes_of_weights(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes in a safetensors file, without the tensors.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{printable(path)} holds no weights that can be read: {_in_a_line(error)}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        Tensors by name, of any shapes.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        open_regular(path).close()
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{printable(path)} holds no weights that can be read: {_in_a_line(error)}") from None


def check_checkpoint(path: Path) -> None:
    """Check that a file of ``torch.save`` is as large as what it holds: PyTorch does not compress.

    Args:
        path: The file; of any format.

    Raises:
        ValueError: If it cannot be read, or is compressed, and so may be far larger in memory.
    """
    try:
        with open_regular(path) as file:
            if zipfile.is_zipfile(file):
                packed = [entry for entry in zipfile.ZipFile(file).infolist() if entry.compress_type]
                if packed and path.suffix != ".npz":
                    raise ValueError("it is compressed, which torch.save does not do")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{printable(path)} holds no weights that can be read: {_in_a_line(error)}") from None


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a safetensors file, or what ``torch.save`` wrote of tensors and plain values.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read, or holds anything else.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    check_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(f"{printable(path)} holds no weights that can be read: {_in_a_line(error)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{printable(path)} holds a {type(content).__name__}, not tensors by name")
    return content


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
