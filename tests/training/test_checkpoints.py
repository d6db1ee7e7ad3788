from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from aptvit.training import checkpoints
from aptvit.training.checkpoints import Checkpoint, newest_checkpoint, write_checkpoint


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


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, checkpoint(1), keep=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("save_file", "_flush"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, name, full)
            with pytest.raises(OSError, match="No space left"):
                write_checkpoint(tmp_path, checkpoint(2), keep=1)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.update == 1


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, file: str, capsys: Any) -> None:
    for update in (1, 2):
        write_checkpoint(tmp_path, checkpoint(update), keep=2)
    (tmp_path / "checkpoints" / "00000002" / file).write_bytes(b"cut off")
    (tmp_path / "checkpoints" / ".00000003.part").mkdir()  # left by a killed process
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.update == 1
    assert "00000002 cannot be read" in capsys.readouterr().err


class Payload:
    """What pickle runs when it is read without ``weights_only``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_a_checkpoint_runs_no_code(tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path, Checkpoint(1, {"w": torch.zeros(1)}, None, {"x": Payload(tmp_path / "touched")}), keep=2)
    assert newest_checkpoint(tmp_path) is None
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "touched").exists()
