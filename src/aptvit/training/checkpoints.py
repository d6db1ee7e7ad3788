"""Checkpoints that are whole or not there: written beside, flushed, renamed.

    RUN/checkpoints/00000120/   model.safetensors  [ema.safetensors]  state.pt

Whenever a process dies, the newest folder can be loaded. A full disk costs a checkpoint, not the training.
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
    """A training at some moment.

    Attributes:
        update: Updates done.
        weights: Of the model.
        ema: Of the average of the weights, if there is one.
        state: Optimizer, schedule, random generators, position in the epoch, and what else the training needs.
    """

    update: int
    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]


def write_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove old ones.

    Args:
        run: Folder of the training.
        checkpoint: What to write.
        keep: Checkpoints to keep, this one included.

    Returns:
        Its folder.

    Raises:
        OSError: If it cannot be written; nothing is left of it then, and older ones are as they were.
    """
    root = run / "checkpoints"
    final, beside = root / f"{checkpoint.update:08d}", root / f".{checkpoint.update:08d}.part"
    for left in root.glob(".*.part"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        _save_weights(checkpoint.weights, beside / _WEIGHTS)
        if checkpoint.ema is not None:
            _save_weights(checkpoint.ema, beside / _EMA)
        torch.save({"update": checkpoint.update, **checkpoint.state}, beside / _STATE)
        for file in beside.iterdir():
            _flush(file)
        if final.exists():
            shutil.rmtree(final)
        os.replace(beside, final)
        _flush(root)
    except Exception as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # safetensors and torch.save wrap the message of the system
        raise OSError(f"cannot write {final}: {' '.join(str(error).split())[:200]}") from error
    for old in _complete(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read; None if there is none."""
    for folder in reversed(_complete(run)):
        try:
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            ema = load_file(folder / _EMA) if (folder / _EMA).is_file() else None
            return Checkpoint(state.pop("update"), load_file(folder / _WEIGHTS), ema, state)
        except Exception as error:  # damaged files raise nearly anything
            reason = " ".join(str(error).split())[:100]
            print(f"{folder} cannot be read ({reason}): the checkpoint before is used", file=sys.stderr)
    return None


def _complete(run: Path) -> list[Path]:
    """Folders of checkpoints, oldest first."""
    return sorted(folder for folder in (run / "checkpoints").glob("[0-9]*") if folder.is_dir())


def _save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
