"""`aptvit evaluate` as a user runs it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data

from aptvit import cli

MODEL = "test_vit"  # timm's smallest ViT: 160 pixels, patches of 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).resize((200, 190)).save(images / f"{name}.png")
    with (images / "labels.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([("file", "class_index"), *((f"{n}.png", 3) for n in ("astronaut", "coffee"))])
    return images


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["aptvit", "evaluate", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_it_writes_a_table_and_a_plot_and_continues(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    base = (folder / "labels.csv", "--model", MODEL, "--checkpoint", checkpoint, "--keeps", 0.6, "--rounds", 1)
    assert run(monkeypatch, *base, "--methods", "apt-embedding,tome@2", "--out", out) == 0
    output = capsys.readouterr()
    assert "apt-embedding" in output.err and "tome" in output.err and str(out / f"{DEVICE}.md") in output.out
    assert {path.name for path in out.glob("[!.]*")} == {f"{DEVICE}.{ending}" for ending in ("json", "md", "svg")}
    assert run(monkeypatch, *base, "--methods", "apt-embedding,tome@2,random", "--out", out, "--json") == 0
    output = capsys.readouterr()
    assert "random" in output.err and "apt-embedding" not in output.err
    assert len(json.loads(output.out)["rows"]) == 4  # with the uniform model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "apt-magic"), "magic"),
        (("--methods", "tomato"), "unknown method 'tomato'"),
        (("--keeps", "1.5"), "keep=1.5 must be a share"),
        (("--model", "vit_teeny"), "timm has no model"),
        (("--methods", "tome@many"), "must be a number"),
    ],
)
def test_wrong_values_print_one_line_with_exit_code_2(
    folder: Path, checkpoint: Path, tmp_path: Path, options: tuple, message: str, monkeypatch: Any, capsys: Any
) -> None:
    base = (folder, "--model", MODEL, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert run(monkeypatch, *base, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
