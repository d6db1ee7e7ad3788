"""From a folder of photos to a configuration that the model runs with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

import aptvit
from aptvit import cli
from aptvit.calibration import costs
from aptvit.calibration import files as calibration
from aptvit.calibration.files import ImageStream, calibrate_files
from aptvit.hosts.pretrained import Host, load_host

MODEL = "test_vit"  # timm's smallest ViT: 160 pixels, patches of 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Crops of real photos, busy ones and smooth ones, and one file that is none."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, picture in enumerate([data.astronaut(), data.coffee(), data.chelsea(), *load_sample_images().images]):
        image = Image.fromarray(picture)
        for j, side in enumerate((60, 120, 240)):
            image.crop((20, 10, 20 + side, 10 + side)).resize((200, 190)).save(photos / f"{i}-{j}.png")
    (photos / "9-broken.jpg").write_bytes(b"no picture")
    return photos


@pytest.fixture
def host(checkpoint: Path) -> Host:
    return load_host(MODEL, checkpoint)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_photos_are_streamed_and_can_be_read_again(folder: Path, host: Host) -> None:
    stream = ImageStream(files(folder), host.data, batch_size=4)
    for _ in range(2):
        batches = list(stream)
        assert [len(batch) for batch in batches] == [4, 4, 4, 3]
        assert all(batch.dtype == torch.uint8 and batch.shape[1:] == (3, 160, 160) for batch in batches)
        assert len(stream.skipped) == 1 and "9-broken.jpg" in stream.skipped[0]
    assert next(iter(ImageStream(files(folder), host.data, size=96))).shape[-1] == 96
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        list(ImageStream(files(folder)[-1:], host.data))


def test_the_file_gives_the_model_that_was_calibrated(folder: Path, host: Host, tmp_path: Path) -> None:
    calibrated = calibrate_files(host, files(folder), {"keep": 0.6}, {"scales": 3, "min_keep": 0.2}, hold_back=3)
    assert len(calibrated.skipped) == 1 and calibrated.size == 160
    assert calibrated.calibration.reached["keep"] == pytest.approx(0.6, abs=0.01)
    assert calibrated.calibration.held_back is not None and calibrated.calibration.held_back.num_images == 5
    calibration.write_config(calibrated, MODEL, tmp_path / "new" / "config.json")
    options = aptvit.read_config(tmp_path / "new" / "config.json")
    again = aptvit.adapt(host.model, **options)
    assert again.budget == calibrated.model.budget
    (batch,) = ImageStream(files(folder), host.data)
    layout = again.layout(batch)
    assert layout.keep_ratio == pytest.approx(0.6, abs=0.01)
    assert torch.equal(again(batch), calibrated.model(batch))


# The command


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["aptvit", "calibrate", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("wish", [("--keep", 0.6), ("--gflops", 0.03), ("--speedup", 1.3), ()])
def test_the_command_writes_a_configuration(
    folder: Path, checkpoint: Path, tmp_path: Path, wish: tuple, monkeypatch: Any, capsys: Any
) -> None:
    def proportional(runs: Any, rounds: int, device: str) -> list[list[float]]:
        """Times of a machine that takes as long as there are tokens: real ones depend on what else it does."""
        return [[run.keywords["keep"]] * rounds for run in runs]

    monkeypatch.setattr(costs, "interleaved", proportional)
    out = tmp_path / "out" / "config.json"
    base = (folder, "--model", MODEL, "--checkpoint", checkpoint, "--scales", 3, "--out", out)
    if wish[:1] == ("--gflops",):
        calibrated = calibrate_files(load_host(MODEL, checkpoint), files(folder), {"keep": 0.6}, {"scales": 3})
        tokens = torch.tensor([0.6 * 100 + 1]).numpy()
        wish = ("--gflops", float(costs.gflops_of_tokens(calibrated.model)(tokens, 100)[0]))
    assert run(monkeypatch, *base, *wish) == 1  # a file is broken
    output = capsys.readouterr()
    assert "Thresholds" in output.out and str(out) in output.out and "9-broken.jpg" in output.err
    written = json.loads(out.read_text())
    assert written["architecture"] == MODEL and len(written["aptvit"]["thresholds"]) == 2
    assert run(monkeypatch, *base, *wish, "--json") == 1
    result = json.loads(capsys.readouterr().out)
    name = (wish or ("--keep",))[0][2:]
    assert result["reached"][name] == pytest.approx(wish[1] if wish else 0.5, rel=0.02)
    assert ("measured_speedup" in result) == (name == "speedup")


def test_a_glance_is_taught_and_the_whole_model_saved(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "model"
    base = (folder, "--model", MODEL, "--checkpoint", checkpoint, "--scorer", "glance", "--out", out)
    assert run(monkeypatch, *base, "--keep", 0.6) == 1
    assert str(out) in capsys.readouterr().out
    again = aptvit.from_pretrained(out)
    (batch,) = ImageStream(files(folder), load_host(MODEL, checkpoint).data)
    assert again.layout(batch).keep_ratio == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("scorer", ["entropy", "glance"])
def test_compare_takes_what_calibrate_wrote(
    folder: Path, checkpoint: Path, tmp_path: Path, scorer: str, monkeypatch: Any, capsys: Any
) -> None:
    file, report = tmp_path / "config.json", tmp_path / "report"
    of_model = ("--model", MODEL, "--checkpoint", checkpoint)
    assert run(monkeypatch, folder, *of_model, "--keep", 0.6, "--min-keep", 0.3, "--out", file) == 1
    output = json.loads(file.read_text())
    output["aptvit"]["scorer"] = scorer
    file.write_text(json.dumps(output))
    capsys.readouterr()

    def compared(*args: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["aptvit", "compare", str(folder), *map(str, args), "--config", str(file)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert compared(*of_model, "--rounds", 1, "--json", "--out", report) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["scorer"] == scorer and result["thresholds"] == output["aptvit"]["thresholds"]
    if scorer == "entropy":
        assert result["keep_ratio"] == pytest.approx(0.6, abs=0.02)
    assert compared("--model", "vit_tiny_patch16_224", "--out", report) == 2
    assert f"give --model '{MODEL}'" in capsys.readouterr().err
    assert compared(*of_model, "--keep", 0.7, "--out", report) == 2
    assert "--keep and --config: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scorer", "glance"), "give --out a folder"),
        (("--keep", 0.5, "--gflops", 3), "--keep and --gflops: give only one target"),
        (("--keep", 0.01), "keep=0.01 cannot be reached"),
        (("--keep", 2), "keep=2.0 must be a share"),
        (("--model", "vit_tiny"), "timm has no model"),
        (("--out", "/proc/nowhere/config.json"), "cannot write to /proc/nowhere"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, options: tuple, message: str, monkeypatch: Any, capsys: Any
) -> None:
    base = (folder, "--model", MODEL, "--out", tmp_path / "config.json")
    assert run(monkeypatch, *base, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_an_empty_folder_is_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, tmp_path / "empty", "--model", MODEL) == 2
    assert "empty" in capsys.readouterr().err
