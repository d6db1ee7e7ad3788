"""Checkpoints of a training: written to a temporary folder, flushed to disk and renamed, so complete or absent.

    RUN/checkpoints/00000120/   model.safetensors  [ema.safetensors]  state.pt

The newest folder can be loaded after a process died at any time. On a full disk a checkpoint is skipped, and the
training continues.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoint", "newest_checkpoint", "write_checkpoint"]

_WEIGHTS, _EMA, _STATE = "model.safetensors", "ema.safetensors", "state.pt"


@dataclass(frozen=True)
class Checkpoint:
    """State of a training after an update.

    Attributes:
        update: Number of finished updates.
        weights: State dict of the network.
        ema: State dict with the moving average of the weights; None if none is kept.
        state: All other state: optimizer, random generators, thresholds, seconds of training.
    """

    update: int
    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


def write_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove old checkpoints.

    Args:
        run: Folder of the training.
        checkpoint: The checkpoint to write.
        keep: Number of checkpoints to keep, the new one included.

    Returns:
        Folder of the checkpoint.

    Raises:
        OSError: If the checkpoint cannot be written. Its files are removed then, and older checkpoints are unchanged.
    """
    root = run / "checkpoints"
    final, temporary = root / f"{checkpoint.update:08d}", root / f".{checkpoint.update:08d}.part"
    for incomplete in root.glob(".*.part"):  # of processes that were killed
        shutil.rmtree(incomplete, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _save_weights(checkpoint.weights, temporary / _WEIGHTS)
        if checkpoint.ema is not None:
            _save_weights(checkpoint.ema, temporary / _EMA)
        torch.save({"update": checkpoint.update, **checkpoint.state}, temporary / _STATE)
        for file in temporary.iterdir():
            _flush(file)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(root)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # safetensors and torch.save wrap the error of the operating system
        raise OSError(f"cannot write {final}: {' '.join(str(error).split())[:200]}") from error
    for old in _complete(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is not damaged; None if there is none."""
    for folder in reversed(_complete(run)):
        try:
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            ema = load_file(folder / _EMA) if (folder / _EMA).is_file() else None
            return Checkpoint(state.pop("update"), load_file(folder / _WEIGHTS), ema, state)
        except Exception as error:  # damaged files raise errors of many types
            reason = " ".join(str(error).split())[:100]
            print(f"{folder} cannot be read ({reason}): using the previous checkpoint", file=sys.stderr)
    return None


def _complete(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(folder for folder in (run / "checkpoints").glob("[0-9]*") if folder.is_dir())


def _save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
