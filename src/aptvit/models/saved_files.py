"""Checks of the configuration of a saved model, which anybody may have written, before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aptvit.files.text import printable, read_json
from aptvit.files.weights import shapes_of_weights

__all__ = ["check_shapes", "check_values", "errors_name", "read_settings"]

_MAX_BYTES = 20_000_000  # of a configuration
_LARGEST = 1e12
_WORDS = {
    "interpolation": ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos", "random", ""),
    "crop_mode": ("center", "squash", "border"),
}
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("scales", "num_scales"), (1, 16)),
    **dict.fromkeys(("img_size", "input_size", "image_size", "size", "crop", "longer_side"), (0, 16_384)),
    **dict.fromkeys(("window_size", "patch_size"), (1, 1024)),
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers"), (0, 1000)),
    "num_classes": (0, 1_000_000),
    "crop_pct": (0.1, 10),
    "shrink": (0.01, 1),
    "mean": (-1e6, 1e6),
    "std": (1e-6, 1e6),
}
"""Least and greatest value of numbers that say how much memory or time a model takes."""
_FRACTIONS = ("crop_pct", "shrink", "mean", "std")  # the others are whole numbers


def read_settings(path: Path) -> dict[str, Any]:
    """Read the configuration of a model, with its values checked.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read, holds no names and values, or a value is out of its range.
    """
    config = read_json(path, _MAX_BYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{printable(path)} holds no names and values: give a file that save_pretrained wrote")
    with errors_name(path):
        check_values(config)
    return config


def check_values(value: Any, name: str = "", depth: int = 0) -> None:
    """Check nested names and values: numbers are finite, and in the range of what they are; words are known.

    Args:
        value: The values.
        name: Name of the value, which says the range.
        depth: How deep the value is nested.

    Raises:
        ValueError: If a value is none of those.
    """
    if depth > 20:
        raise ValueError(f"{name} is nested too deeply")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_values(inner, str(key), depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_values(inner, name, depth + 1)
    elif isinstance(value, str) and name in _RANGES:
        raise ValueError(f"{name}={value[:100]!r} must be a number")
    elif value is not None and name in _WORDS and value not in _WORDS[name]:
        raise ValueError(f"{name}={str(value)[:100]!r} must be one of {', '.join(_WORDS[name])}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and name in _RANGES and name not in _FRACTIONS:
            raise ValueError(f"{name}={value!r} must be a whole number")
        least, most = _RANGES.get(name, (-_LARGEST, _LARGEST))
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError(f"{name}={value!r} must be from {least:g} to {most:g}"[:300])


def check_shapes(network: Any, path: Path) -> None:
    """Check that a file holds the weights of a network, before they are read.

    Args:
        network: The network; its parameters may be on the device "meta".
        path: The safetensors file.

    Raises:
        ValueError: If it cannot be read, or names or shapes differ.
    """
    shapes = shapes_of_weights(path)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    misfits = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if misfits:
        name = misfits[0]
        raise ValueError(
            f"{printable(path)} does not hold the weights of its configuration: {len(misfits)} differ, such as "
            f"{printable(name[:100])}, {shapes.get(name, 'missing')} instead of {expected.get(name, 'none')}"
        )


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Context in which all errors become a ValueError that names a file.

    Libraries meet values that they do not expect with nearly any exception.

    Args:
        path: The file that values are from.

    Raises:
        ValueError: If anything fails.
    """
    try:
        yield
    except Exception as error:
        if printable(path.parent) in str(error):
            raise ValueError(str(error)) from error
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{printable(path)} describes no model: {reason or type(error).__name__}") from error
