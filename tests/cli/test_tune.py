"""`aptvit tune` as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import aptvit
from aptvit import cli
from aptvit.files.sample_photos import sample_photos
from aptvit.tuning import space
from aptvit.tuning.space import Candidate

MODEL = "test_vit"  # timm's smallest ViT: 160 pixels, patches of 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eighteen photos, and a file that is none."""
    images = tmp_path / "images"
    images.mkdir()
    for name, photo in sample_photos().items():
        for turn in (0, 180):
            Image.fromarray(photo).resize((200, 170)).rotate(turn).save(images / f"{name}{turn}.png")
    (images / "broken.jpg").write_bytes(b"no image")
    return images


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["aptvit", "tune", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_it_says_what_to_take_and_writes_a_model(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few(size: int, patch_size: int) -> list[Candidate]:
        assert (size, patch_size) == (160, 16)
        return [
            Candidate("downscale", size),
            Candidate("apt-entropy", size),
            Candidate("apt-embedding", 128),
            Candidate("tome", size),
        ]

    monkeypatch.setattr("aptvit.tuning.search.default_candidates", few)
    out = tmp_path / "tuned"
    command = (folder, "--model", MODEL, "--checkpoint", checkpoint, "--gflops", 0.03, "--rounds", 1, "--out", out)
    assert run(monkeypatch, *command) == 1  # an image is broken
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err
    assert "On 6 images that the search did not see" in printed.out
    first = out / "tune.json"
    trials = json.loads(first.read_text())["rows"]
    assert {trial["candidate"]["name"] for trial in trials} == {"downscale", "apt-entropy", "apt-embedding", "tome"}
    assert {trial["candidate"]["size"] for trial in trials} == {160, 128}
    assert aptvit.from_pretrained(out).keep is not None
    sentence = next(line for line in (out / "tuned.md").read_text().splitlines() if line.startswith(("Take", "Leave")))
    # The second run measures nothing again.
    assert run(monkeypatch, *command, "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["sentence"] == sentence
    assert json.loads(first.read_text())["rows"] == trials


def test_wrong_input_is_one_line(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = ("--model", MODEL, "--checkpoint", checkpoint, "--out", tmp_path / "tuned")
    (tmp_path / "few").mkdir()
    Image.new("RGB", (200, 200)).save(tmp_path / "few" / "one.png")
    aptvit.adapt(timm.create_model(MODEL), keep=0.5).save_pretrained(tmp_path / "saved")
    for args, message in (
        ((folder, *host, "--time", 0.5, "--gflops", 3), "--time and --gflops: give only one target"),
        ((folder, *host, "--time", 1.5), "time=1.5 must be above 0 and at most 1"),
        ((tmp_path / "few", *host), "1 images are too few to choose by"),
        ((tmp_path / "none", *host), "none"),
        ((folder, "--model", tmp_path / "saved"), "is adaptive already: give --model the uniform model"),
        ((folder, "--model", MODEL, "--out", tmp_path / "other"), "random weights: give trained weights"),
        ((folder, "--model", "vit_no_such"), "timm has no model 'vit_no_such'"),
    ):
        monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: False)
        assert run(monkeypatch, *args) == 2, args
        output = capsys.readouterr()
        lines = [line for line in output.err.splitlines() if line and not line.startswith("The hub gave")]
        assert len(lines) == 1 and message in lines[0], output.err


@pytest.mark.slow
def test_the_candidates_by_default_can_all_run_or_say_why(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tuned"
    command = (folder, "--model", MODEL, "--checkpoint", checkpoint, "--agreement", 0.5, "--rounds", 1, "--out", out)
    assert run(monkeypatch, *command) == 1
    rows = json.loads((out / "tune.json").read_text())["rows"]
    assert {(row["candidate"]["name"], row["candidate"]["size"]) for row in rows} == {
        (candidate.name, candidate.size) for candidate in space.default_candidates(160, 16)
    }
    reasons = ("least share", "cannot go down to")
    assert not [row for row in rows if row["error"] and not any(reason in row["error"] for reason in reasons)]
