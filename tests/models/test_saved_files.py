"""Folders of saved models that anybody may have written: one ValueError that names the file, and nothing else."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import aptvit
from aptvit.models.saved_files import check_values, read_settings

MODEL = "test_vit"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    aptvit.adapt(timm.create_model(MODEL, num_classes=3).eval(), keep=0.5).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network is touched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def changed(saved: Path, folder: Path, *keys: str, value: Any) -> Path:
    """A copy of a saved model with another value in its configuration."""
    config: Any = json.loads((saved / "config.json").read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    if not (folder / "model.safetensors").exists():
        os.link(saved / "model.safetensors", folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["architecture"], "hf-hub:owner/name", "timm has no model"),
        (["architecture"], "local-dir:/etc", "timm has no model"),
        (["architecture"], 5, "timm has no model"),
        (["architecture"], "vit_tiny_patch16_224", "does not hold the weights of its configuration"),
        (["model_args", "checkpoint_path"], "/etc/passwd", "must not have checkpoint_path"),
        (["model_args", "pretrained"], True, "must not have pretrained"),
        (["model_args"], [1], "describes no model"),
        (["model_args", "depth"], 10**9, "depth=1000000000 must be from 0 to 1000"),
        (["model_args", "embed_dim"], 10**9, "config.json"),
        (["model_args", "num_heads"], 0, "config.json"),
        (["model_args", "unknown"], 1, "config.json"),
        (["pretrained_cfg", "mean"], "abc", "mean='abc' must be a number"),
        (["pretrained_cfg", "mean"], [float("nan")] * 3, "mean=nan must be"),
        (["pretrained_cfg", "crop_pct"], 1e-9, "crop_pct=1e-09 must be"),
        (["pretrained_cfg", "input_size"], [3, 10**6, 10**6], "input_size=1000000 must be"),
        (["pretrained_cfg", "interpolation"], "exec", "interpolation='exec' must be one of"),
        (["aptvit", "scales"], 10**9, "scales=1000000000 must be from 1 to 16"),
        (["aptvit", "window_size"], 10**9, "window_size=1000000000 must be"),
        (["aptvit", "scorer"], "os.system", "config.json"),
        (["aptvit", "keep"], "half", "config.json"),
        (["aptvit"], [1], "describes no adaptive model"),
        (["id2label"], {"0": "a", "1": "b", "x": "c"}, "config.json"),
        (["num_classes"], 10**9, "num_classes=1000000000 must be from 0 to"),
        (["num_classes"], 4, "num_classes=4, and the weights are of 3"),
        (["aptvit", "scales"], 2.0, "scales=2.0 must be a whole number"),
        (["id2label"], {"0": 1}, "id2label must hold names"),
        (["dtype"], "load", "config.json describes no model"),
        (["library"], "transformers", "config.json"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:20],
)
def test_a_hostile_configuration_is_one_error(
    keys: list[str], value: Any, message: str, saved: Path, tmp_path: Path
) -> None:
    folder = changed(saved, tmp_path, *keys, value=value)
    with pytest.raises(ValueError, match=message) as refused:
        aptvit.from_pretrained(folder)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("key", ["architecture", "model_args", "pretrained_cfg"])
def test_a_missing_key_is_named(key: str, saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    os.link(saved / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"config.json describes no model: no '{key}'"):
        aptvit.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "null", "[" * 100_000, '{"aptvit": 5}', "\x00"])
def test_what_is_no_configuration_is_one_error(text: str, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    os.link(saved / "model.safetensors", tmp_path / "model.safetensors")
    for load in (lambda: aptvit.from_pretrained(tmp_path), lambda: aptvit.read_config(tmp_path / "config.json")):
        with pytest.raises(ValueError, match=r"config\.json") as refused:
            load()
        assert "\n" not in str(refused.value)


def sparse(path: Path) -> None:
    """A header that promises a tensor of 40 GB, and a file as large."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [40 * 10**9], "data_offsets": [0, 40 * 10**9]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 40 * 10**9)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
        lambda path: path.write_bytes(b"\x05" + bytes(7) + b"hello"),
        lambda path: save_file({"x": torch.zeros(2)}, path),
        sparse,
    ],
    ids=["empty", "endless header", "no header", "of another model", "40 GB"],
)
def test_hostile_weights_are_one_error(write: Callable[[Path], Any], saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    write(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors") as refused:
        aptvit.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_numbers_are_checked_at_any_depth() -> None:
    check_values({"a": [{"scales": 3, "x": True, "y": None, "z": "text"}]})
    for value in ({"a": [{"scales": 99}]}, {"a": float("inf")}, {"a": {"b": [1e300]}}):
        with pytest.raises(ValueError, match="must be from"):
            check_values(value)
    nested: Any = 1
    for _ in range(50):
        nested = [nested]
    with pytest.raises(ValueError, match="nested"):
        check_values(nested)


def test_good_settings_are_read(saved: Path) -> None:
    assert read_settings(saved / "config.json")["architecture"] == MODEL
    assert aptvit.from_pretrained(saved).keep == 0.5
