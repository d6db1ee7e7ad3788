"""Whose model a folder holds, before any library of models is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aptvit.files.text import read_json

__all__ = ["SETTINGS_FILE", "is_of_transformers", "read_config"]

SETTINGS_FILE = "aptvit.json"
"""Beside the files of a host that is saved in its own library's way: what makes it adaptive."""

_FILE = "config.json"
_MAX_BYTES = 20_000_000


def read_config(folder: Path) -> Any:
    """Read the configuration in a folder.

    Raises:
        ValueError: If there is none, or it is not JSON.
    """
    return read_json(folder / _FILE, _MAX_BYTES)


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder holds a model as transformers saves it, without anything of aptvit in its configuration.

    Raises:
        ValueError: If the configuration is not JSON.
    """
    if not (folder / _FILE).is_file():
        return False
    config = read_config(folder)
    return isinstance(config, dict) and "model_type" in config and "aptvit" not in config
