"""Whose model a folder holds, before any library of models is imported."""

from __future__ import annotations

from pathlib import Path

from aptvit.files.text import read_json

__all__ = ["CONFIG_FILE", "is_of_transformers"]

CONFIG_FILE = "config.json"
_MAX_BYTES = 20_000_000


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder holds a model as transformers saves it, without anything of aptvit in its configuration.

    Raises:
        ValueError: If the configuration is not JSON.
    """
    if not (folder / CONFIG_FILE).is_file():
        return False
    config = read_json(folder / CONFIG_FILE, _MAX_BYTES)
    return isinstance(config, dict) and "model_type" in config and "aptvit" not in config
