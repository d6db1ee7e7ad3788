from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aptvit.storage import writing
from aptvit.storage.writing import WriteError
from aptvit.training import checkpoints
from aptvit.training.checkpoints import Checkpoint, newest_checkpoint, write_checkpoint, write_model


def checkpoint(update: int) -> Checkpoint:
    state = {"optimizer": {"state": {0: {"step": torch.tensor(update)}}}, "seconds": 1.5, "thresholds": {0.5: (5.0,)}}
    return Checkpoint(update, {"w": torch.full((2, 3), float(update))}, {"w": torch.zeros(2, 3)}, state)


def test_checkpoints_are_written_and_read(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for update in (2, 10, 9):
        write_checkpoint(tmp_path, checkpoint(update), keep=2)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.update == 10 and newest.ema is not None
    assert torch.equal(newest.weights["w"], torch.full((2, 3), 10.0))
    assert newest.state == checkpoint(10).state
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000009", "00000010"]
    write_checkpoint(tmp_path, checkpoint(10), keep=2)  # writing it again replaces it


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_full_disk_keeps_the_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for update in (1, 2):
        write_checkpoint(tmp_path, checkpoint(update), keep=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match="00000003: the disk is full") as caught:
            write_checkpoint(tmp_path, checkpoint(3), keep=1)
    assert caught.value.is_full and names(tmp_path) == ["00000002"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.update == 2


def test_older_checkpoints_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk with room for two, of which two are kept, a third can be written."""
    for update in (1, 2):
        write_checkpoint(tmp_path, checkpoint(update), keep=2)
    monkeypatch.setattr(writing, "free_bytes", lambda folder: 10**6 if len(names(tmp_path)) < 3 else 0)
    write_checkpoint(tmp_path, checkpoint(3), keep=2)
    assert names(tmp_path) == ["00000002", "00000003"]


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, file: str, damage: str) -> None:
    for update in (1, 2):
        write_checkpoint(tmp_path, checkpoint(update), keep=2)
    path = tmp_path / "checkpoints" / "00000002" / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:middle])
    else:  # in the list of digests, any bit
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    earlier = tmp_path / "checkpoints" / "00000001"
    with pytest.raises(ValueError, match=rf"00000002 is damaged, .*: delete it to continue from {earlier}") as refused:
        newest_checkpoint(tmp_path)
    assert file == "checkpoint.json" or file in str(refused.value)
    shutil.rmtree(earlier)
    with pytest.raises(ValueError, match="no other is whole, begin in another --out"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("part", ["weights", "ema", "optimizer"])
def test_a_checkpoint_is_finite_or_not_written(tmp_path: Path, part: str) -> None:
    for update in (1, 2):
        write_checkpoint(tmp_path, checkpoint(update), keep=2)
    bad, infinite = checkpoint(3), {"w": torch.tensor([1.0, float("nan"), float("inf")])}
    if part == "optimizer":
        bad.state["optimizer"]["state"][0]["exp_avg"] = infinite["w"]
    else:
        bad = replace(bad, **{part: infinite})
    with pytest.raises(ValueError, match="are not finite after 3 updates, and are not saved: lower lr"):
        write_checkpoint(tmp_path, bad, keep=2)
    assert names(tmp_path) == ["00000001", "00000002"]


@pytest.mark.parametrize("moment", [0, 1])
def test_a_process_killed_while_a_checkpoint_is_replaced(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder cannot be replaced in one step: the earlier is moved away, then the new one takes its place."""
    write_checkpoint(tmp_path, checkpoint(1), keep=1)
    renames, rename = [], os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            if len(renames) == moment:
                raise KeyboardInterrupt
            renames.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, checkpoint(1), keep=1)
    monkeypatch.undo()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.update == 1 and names(tmp_path) == ["00000001"]


def test_room_for_the_model_is_made_of_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for update in (1, 2, 3):
        write_checkpoint(tmp_path, checkpoint(update), keep=3)
    newest = tmp_path / "checkpoints" / "00000003"
    (newest / "state.pt").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 0)
    states = []

    def save() -> None:
        states.append(sorted(path.suffix for path in newest.glob("*")))
        if len(states) % 2:
            raise WriteError("model.safetensors", "the disk is full", is_full=True)

    # The state of the newest is too small to make room, and stays.
    assert [path.name for path in write_model(tmp_path, save, 4 << 20)] == ["00000001", "00000002"]
    assert [path.name for path in write_model(tmp_path, save, 1 << 20)] == ["state.pt"]
    weights = [".json", ".safetensors", ".safetensors"]
    assert states == [sorted([*weights, ".pt"])] * 3 + [weights]  # until the model is written
    assert names(tmp_path) == []
    with pytest.raises(WriteError, match=r"model: the disk is full; the same command with --resume writes it then"):
        write_model(tmp_path, save, 1)


class Payload:
    """What pickle runs when it is read without ``weights_only``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Checkpoint(1, {"w": torch.zeros(1)}, None, {"x": Payload(tmp_path / "touched")}), keep=2)
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        newest_checkpoint(tmp_path)
    assert not (tmp_path / "touched").exists()
