"""Clips side by side, and the table of `aptvit compare --video`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

import aptvit
from aptvit.cli import app
from aptvit.compare.clips import compare_clips


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """(6, 128, 128, 3) uint8: a cup, and a square that appears before it."""
    clip = np.repeat(data.coffee()[None, 100:228, 200:328], 6, axis=0).copy()
    clip[3:, 20:60, 20:60] = 255
    return clip


def test_rows(make_host: Callable[..., Any], frames: np.ndarray) -> None:
    host = make_host("vit_tiny_patch16_224")
    model = aptvit.adapt(host, thresholds=(5.5,)).eval()
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    nothing, some = compare_clips(host, model, [clip], [-1.0, 1.0], 1)
    assert nothing.tokens == nothing.tokens_alone == pytest.approx(model.layout(clip).keep_ratio)
    assert nothing.agreement == 1.0 and nothing.divergence == pytest.approx(0, abs=1e-5)
    changed = clip.unflatten(2, (8, 16)).unflatten(4, (8, 16)).float().diff(dim=0).abs().amax((1, 3, 5)) > 0
    assert some.tokens < nothing.tokens and changed.sum() == 9  # one change, in 3 x 3 patches
    assert some.speedup.median > 0 and some.speedup_uniform.median > 0


def test_the_command(frames: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "weights.safetensors")
    pictures = [Image.fromarray(one) for one in frames]
    pictures[0].save(tmp_path / "clip.webp", save_all=True, append_images=pictures[1:], lossless=True)
    (tmp_path / "broken.webp").write_bytes(b"RIFF")
    words = ["compare", str(tmp_path / "clip.webp"), str(tmp_path / "broken.webp"), "--video", "--rounds", "1"]
    words += ["--model", "test_vit", "--checkpoint", str(tmp_path / "weights.safetensors"), "--tolerance", "0,2"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    told = json.loads(result.stdout)
    assert result.exit_code == 1  # one of them could not be read
    assert [row["tolerance"] for row in told] == [0, 2] and "broken.webp" in result.stderr
    assert all(row["tokens"] < row["tokens_alone"] == pytest.approx(0.5, abs=0.15) for row in told)
    assert not (tmp_path / "compare").exists()
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "clip.webp" in result.stdout and "tolerance" in result.stdout
    result = CliRunner().invoke(app, [*words, "--dtype", "bfloat16", "--json"], catch_exceptions=False)
    half = json.loads(result.stdout)
    assert [row["tokens"] for row in half] == [row["tokens"] for row in told]  # raw pixels decide
    assert half[1]["divergence"] != told[1]["divergence"] == pytest.approx(half[1]["divergence"], abs=0.02)
    with pytest.raises(ValueError, match="glance is not trained on clips"):
        CliRunner().invoke(app, [*words, "--scorer", "glance"], catch_exceptions=False)
