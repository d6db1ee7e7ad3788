"""Checkpoints of a training: written to a temporary folder, flushed to disk and renamed, so complete or absent.

    RUN/checkpoints/00000120/   model.safetensors  [ema.safetensors]  state.pt  checkpoint.json

``checkpoint.json`` has the digests of the other files, and what a training that continues must agree on. The newest
folder can be loaded after a process died at any time. On a full disk a checkpoint is skipped, and the training
continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aptvit.storage.writing import WriteError, digest_file, flush, free_bytes, save_state, save_weights, write_json

__all__ = ["FORMAT", "Checkpoint", "holds_checkpoints", "newest_checkpoint", "write_checkpoint", "write_model"]

FORMAT = 2
"""Version of the format of checkpoints."""

_WEIGHTS, _EMA, _STATE, _LIST = "model.safetensors", "ema.safetensors", "state.pt", "checkpoint.json"
_MARGIN = 1 << 20  # bytes beside those of the weights: configuration, results, page


@dataclass(frozen=True)
class Checkpoint:
    """State of a training after an update.

    Attributes:
        update: Number of finished updates.
        weights: State dict of the network.
        ema: State dict with the moving average of the weights; None if none is kept.
        state: All other state: optimizer, random generators, thresholds, seconds of training.
        agreement: What a training that continues must agree on, see `aptvit.training.agreement`; JSON.
        folder: Folder that it was read from; None for a new checkpoint.
    """

    update: int
    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]
    agreement: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def write_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove old checkpoints; on a full disk all but the newest are removed first.

    Args:
        run: Folder of the training.
        checkpoint: The checkpoint to write.
        keep: Number of checkpoints to keep, the new one included.

    Returns:
        Folder of the checkpoint.

    Raises:
        ValueError: If weights or the state of the optimizer are not finite. Nothing is written then.
        WriteError: If the checkpoint cannot be written. Its files are removed then, and older checkpoints, or the
            newest of them on a full disk, are unchanged.
    """
    _check_finite(checkpoint)
    try:
        final = _write(run, checkpoint)
    except WriteError as error:
        superseded = _complete(run)[:-1]
        if not (error.is_full and superseded):
            raise
        for old in superseded:
            shutil.rmtree(old, ignore_errors=True)
        final = _write(run, checkpoint)
    for old in _complete(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _check_finite(checkpoint: Checkpoint) -> None:
    state = checkpoint.state.get("optimizer")
    parts = {"weights": checkpoint.weights, "averaged weights": checkpoint.ema, "values of the optimizer": state}
    for kind, values in parts.items():
        for name, tensor in _tensors("", values):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"the {kind} {name} are not finite after {checkpoint.update} updates, and are not saved: lower "
                    "lr, or set clip=1"
                )


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested values, with their names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{name} {key}".strip(), part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(name, part)


def _write(run: Path, checkpoint: Checkpoint) -> Path:
    root = run / "checkpoints"
    name = f"{checkpoint.update:08d}"
    final, temporary, earlier = root / name, root / f".{name}.part", root / f".{name}.old"
    _tidy(root)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_weights(checkpoint.weights, temporary / _WEIGHTS)
        if checkpoint.ema is not None:
            save_weights(checkpoint.ema, temporary / _EMA)
        save_state({"update": checkpoint.update, **checkpoint.state}, temporary / _STATE)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": digest_file(file)} for file in temporary.iterdir()}
        write_json(temporary / _LIST, {"format": FORMAT, "files": files, "agreement": checkpoint.agreement})
        if final.exists():
            os.replace(final, earlier)  # a folder cannot be replaced: `_tidy` undoes this if the process is killed here
        os.replace(temporary, final)
        flush(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WriteError(final, error.strerror or str(error), getattr(error, "is_full", False)) from error
    shutil.rmtree(earlier, ignore_errors=True)
    return final


def _tidy(root: Path) -> None:
    """Remove what killed processes left, and put a checkpoint back that was about to be replaced."""
    for incomplete in root.glob(".*.part"):
        shutil.rmtree(incomplete, ignore_errors=True)
    for earlier in root.glob(".*.old"):
        final = root / earlier.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):  # another process of the training did it
                os.replace(earlier, final)


def holds_checkpoints(run: Path) -> bool:
    """Whether there are checkpoints in the folder of a training."""
    return bool(_complete(run))


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Read the newest checkpoint; None if there is none.

    Raises:
        ValueError: If it is damaged; the message names the newest one that is whole.
    """
    _tidy(run / "checkpoints")
    folders = _complete(run)
    if not folders:
        return None
    *older, newest = folders
    problem = _problem(newest)
    try:
        state = {} if problem else torch.load(newest / _STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that was made to run code, or by another version of torch
        problem = f"{_STATE} cannot be read ({type(error).__name__})"
    if problem:
        whole = next((folder for folder in reversed(older) if not _problem(folder)), None)
        remedy = f"delete it to continue from {whole}" if whole else "no other is whole, begin in another --out"
        raise ValueError(f"the checkpoint {newest} is damaged, {problem}: {remedy}")
    ema = load_file(newest / _EMA) if (newest / _EMA).is_file() else None
    agreement = json.loads((newest / _LIST).read_text(encoding="utf-8"))["agreement"]
    return Checkpoint(state.pop("update"), load_file(newest / _WEIGHTS), ema, state, agreement, newest)


def _problem(folder: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / _LIST).read_text(encoding="utf-8"))["files"]
        missing = [name for name in (*files, _WEIGHTS, _STATE) if not (folder / name).is_file() or name not in files]
        if missing:
            return f"{missing[0]} is missing"
        changed = [name for name, values in files.items() if digest_file(folder / name) != values["sha256"]]
        return f"{changed[0]} is not what was written" if changed else ""
    except FileNotFoundError:
        return f"{_LIST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_LIST} cannot be read ({type(error).__name__})"


def write_model(run: Path, save: Callable[[], None], size: int) -> list[Path]:
    """Write the model of a finished training; on a full disk checkpoints make room, because the model replaces them.

    Of the newest checkpoint the weights stay until the model is written; its other state goes only if that is enough.

    Args:
        run: Folder of the training.
        save: Writes the model.
        size: Number of bytes that the model needs.

    Returns:
        What was deleted.

    Raises:
        WriteError: If the model cannot be written all the same.
    """
    try:
        save()
        return []
    except WriteError as error:
        deleted = _make_room(run, size) if error.is_full else []
        if not deleted:
            reason = f"{error.strerror}; the same command with --resume writes it then"
            raise WriteError(run / "model", reason, error.is_full) from None
    save()
    for state in deleted:
        if state.name == _STATE:  # what is left of the checkpoint is of no use without it
            shutil.rmtree(state.parent, ignore_errors=True)
    return deleted


def _make_room(run: Path, needed: int) -> list[Path]:
    deleted: list[Path] = []
    *older, newest = _complete(run) or [run]
    for old in older:
        shutil.rmtree(old, ignore_errors=True)
        deleted.append(old)
    state, free = newest / _STATE, free_bytes(run)
    missing = 0 if free is None else needed + _MARGIN - free
    if state.is_file() and 0 < missing <= state.stat().st_size:
        state.unlink()
        deleted.append(state)
    return deleted


def _complete(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(folder for folder in (run / "checkpoints").glob("[0-9]*") if folder.is_dir())
