"""Files are written whole or not at all: after errors and crashes the earlier file is there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aptvit.storage import writing
from aptvit.storage.writing import (
    WriteError,
    digest_file,
    replacing,
    save_model,
    save_state,
    save_weights,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "new"  # is made
    write_json(folder / "a.json", {"a": 1})
    write_json(folder / "a.json", {"a": 2})
    write_text(folder / "b.txt", "ü\ud800", errors="replace")
    save_weights({"w": torch.arange(6.0).view(2, 3).T}, folder / "c.safetensors")
    save_state({"x": [1, torch.ones(2)]}, folder / "d.pt")
    assert json.loads((folder / "a.json").read_text()) == {"a": 2}
    assert (folder / "b.txt").read_text(encoding="utf-8") == "ü?"
    assert torch.equal(load_file(folder / "c.safetensors")["w"], torch.arange(6.0).view(2, 3).T)
    assert torch.load(folder / "d.pt", weights_only=True)["x"][0] == 1
    assert names(folder) == ["a.json", "b.txt", "c.safetensors", "d.pt"]
    assert digest_file(folder / "a.json") == hashlib.sha256((folder / "a.json").read_bytes()).hexdigest()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "file.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "disk" / "file.json").read_text() == "1\n"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_an_error_keeps_the_earlier_file(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "a.txt", "whole")
    expected: Any = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), replacing(tmp_path / "a.txt") as draft:
        draft.write_text("ha")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "whole"


def test_a_file_is_on_the_disk_before_it_replaces_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("rename"), replace(*paths)))
    write_text(tmp_path / "a.txt", "text")
    assert steps == ["flush", "rename", "flush"]  # of the file, then of the folder


def test_a_killed_process_leaves_the_earlier_file(tmp_path: Path) -> None:
    code = "import os, sys; from aptvit.storage.writing import replacing\n"
    code += "with replacing(sys.argv[1]) as draft: draft.write_text('ha'); os.kill(os.getpid(), 9)"
    write_text(tmp_path / "a.txt", "whole")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")]).returncode == -9
    assert (tmp_path / "a.txt").read_text() == "whole" and len(names(tmp_path)) == 2
    write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"]  # what the killed process left is removed


def test_a_full_disk_is_told_with_the_room_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.txt", "whole")
    weights = {"w": torch.zeros(1000, 1000)}
    monkeypatch.setattr(writing, "free_bytes", lambda folder: 1_500_000)
    with pytest.raises(WriteError, match=r"w\.safetensors: the disk is full \(it needs 4\.0 MB, 1\.5 MB are free\)"):
        save_weights(weights, tmp_path / "w.safetensors")
    monkeypatch.setattr(writing, "free_bytes", lambda folder: None)  # a disk that does not tell, and is full

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WriteError, match=r"a\.txt: the disk is full; make room") as caught:
        write_bytes(tmp_path / "a.txt", b"new")
    assert caught.value.is_full and (tmp_path / "a.txt").read_text() == "whole" and names(tmp_path) == ["a.txt"]


def test_errors_that_libraries_wrap_are_recognised(tmp_path: Path) -> None:
    """A limit of the size of files stands for a full disk: the error comes from within the library."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from aptvit.storage.writing import WriteError, save_state, save_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
for save in (save_weights, save_state):
    try:
        save({"w": torch.zeros(10**5)}, Path(sys.argv[1]) / "file.x")
    except WriteError as error:
        print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["File too large"] * 2, done.stderr
    assert names(tmp_path) == []


def test_a_model_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, {"w": torch.zeros(2)}, {"thresholds": [1]})
    monkeypatch.setattr(writing, "free_bytes", lambda folder: 100)
    with pytest.raises(WriteError, match="the disk is full"):
        save_model(tmp_path, {"w": torch.ones(200)}, {"thresholds": [2]})
    assert json.loads((tmp_path / "config.json").read_text()) == {"thresholds": [1]}
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.zeros(2))
