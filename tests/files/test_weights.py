"""Weights in files: tensors only, and one ValueError that names the file."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aptvit.files.weights import check_checkpoint, read_checkpoint, read_weights, shapes_of_weights


class Runs:
    """Runs a command as it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_tensors_are_read(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pth")
    assert shapes_of_weights(tmp_path / "a.safetensors") == {"a": (2, 3), "b": ()}
    for content in (read_weights(tmp_path / "a.safetensors"), read_checkpoint(tmp_path / "a.pth")):
        assert all(torch.equal(content[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8 + b"{}", b"\x05" + bytes(7) + b"hello"])
def test_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    for suffix in ("safetensors", "pth"):
        path = tmp_path / f"hostile.{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"hostile.{suffix} holds no weights") as refused:
            read_checkpoint(path)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("of_torch", [True, False])
def test_code_is_never_run(of_torch: bool, tmp_path: Path) -> None:
    path, canary = tmp_path / "a.pth", tmp_path / "canary"
    content = {"a": Runs(f"touch {canary}")}
    if of_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"a\.pth holds no weights"):
        read_checkpoint(path)
    assert not canary.exists()


def test_compressed_files_are_not_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        for name in good.namelist():
            file.writestr(name, good.read(name))
    for read in (read_checkpoint, check_checkpoint):
        with pytest.raises(ValueError, match=r"a\.pth holds no weights that can be read: it is compressed"):
            read(tmp_path / "a.pth")


def test_other_values_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds a list"):
        read_checkpoint(tmp_path / "a.pth")
