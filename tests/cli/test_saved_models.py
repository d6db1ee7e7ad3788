"""Commands with the folder of a trained model, and the names of its classes in their outputs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import class_folders
import pytest
import timm
import torch

import aptvit
from aptvit import cli
from aptvit.hosts.pretrained import set_class_names

NAMES = ["cup", "cat", "sea horse"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders.cats_and_cups(tmp_path_factory.mktemp("images")) / "val"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `heal` and `finetune` leave it: the model in RUN/model."""
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3).eval()
    set_class_names(vit, NAMES)
    run = tmp_path_factory.mktemp("run")
    aptvit.adapt(vit, keep=0.5, scorer="laplacian", init="nonzero").save_pretrained(run / "model")
    return run


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["aptvit", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_configuration_names_the_classes_as_transformers_does(saved: Path) -> None:
    config = json.loads((saved / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "cup", "1": "cat", "2": "sea horse"} and config["label2id"]["sea horse"] == 2
    model = aptvit.from_pretrained(saved / "model")
    assert model.class_names == NAMES
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        model.class_names = ["a", "b"]


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_predictions_have_names(format: str, saved: Path, images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    options = ("--model", saved, "--output", "predictions", "--format", format, "--part-size", 4)
    assert run(monkeypatch, "embed", images, *options, "--out", out) == 0
    if format == "csv":
        rows = [row for part in sorted(out.glob("part-*.csv")) for row in csv.DictReader(part.open())]
        for row in rows:
            assert row["name_1"] == NAMES[int(row["class_1"])] and float(row["share_1"]) >= float(row["share_2"])
    else:
        rows = parquet.read_table(out).to_pylist()
        for row in rows:
            assert row["names"] == [NAMES[number] for number in row["classes"]] and sum(row["shares"]) > 0.99
    assert len(rows) == 6


def test_compare_runs_the_saved_model(saved: Path, images: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    options = ("--model", saved, "--out", tmp_path, "--rounds", 1, "--json")
    assert run(monkeypatch, "compare", images, *options) == 0
    result = json.loads(capsys.readouterr().out)
    model, host = aptvit.from_pretrained(saved / "model"), timm.create_model("test_vit", num_classes=3).eval()
    state = model.state_dict()
    host.load_state_dict({name: state[name] for name in host.state_dict()})
    assert result["keep_ratio"] == pytest.approx(0.5, abs=0.02) and result["scorer"] == "laplacian"
    assert any(name in (tmp_path / "index.html").read_text() for name in NAMES)
    assert 0 <= result["agreement"] <= 1
    assert run(monkeypatch, "compare", images, *options, "--keep", 0.8) == 0
    assert json.loads(capsys.readouterr().out)["keep_ratio"] == pytest.approx(0.8, abs=0.05)


def test_calibrate_and_evaluate_and_benchmark_take_it(
    saved: Path, images: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "calibrated"
    assert run(monkeypatch, "calibrate", images, "--model", saved, "--keep", 0.7, "--out", out) == 0
    model, before = aptvit.from_pretrained(out), aptvit.from_pretrained(saved / "model")
    assert model.thresholds is not None and model.class_names == NAMES
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    capsys.readouterr()
    options = ("--model", saved, "--methods", "saved", "--rounds", 1, "--timed-images", 2, "--json")
    assert run(monkeypatch, "evaluate", images, *options, "--out", tmp_path / "evaluated") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    prefix = before.num_prefix_tokens
    assert rows[1]["tokens"] == pytest.approx((50 + prefix) / (100 + prefix), abs=0.01)
    options = ("--models", saved, "--keeps", "0.5", "--batch-sizes", 2, "--rounds", 1, "--out", tmp_path / "speed")
    assert run(monkeypatch, "benchmark", images, *options) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compare", "IMAGES", "--model", "SAVED", "--scales", "3"), "leave out --scales"),
        (("compare", "IMAGES", "--model", "SAVED", "--checkpoint", "SAVED/model/model.safetensors"), "--checkpoint"),
        (("calibrate", "IMAGES", "--model", "SAVED", "--out", "a.json"), "give --out a folder"),
        (("embed", "IMAGES", "--model", "SAVED", "--format", "csv"), "add --output predictions"),
        (("finetune", "IMAGES", "--epochs", "2", "--set", "epochs=3"), "--epochs and --set epochs=3 set the same"),
        (("heal", "IMAGES", "--minutes", "2", "--set", "max_minutes=3"), "--minutes and --set max_minutes=3"),
        (("evaluate", "IMAGES", "--run", "SAVED"), "--run: not used with --task classification"),
        (
            ("evaluate", "IMAGES", "--task", "detection", "--dtype", "bfloat16"),
            "--dtype: not used with --task",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    words: tuple[str, ...], message: str, saved: Path, images: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"SAVED": str(saved), "IMAGES": str(images)}
    arguments = []
    for word in words:
        for name, place in places.items():
            word = word.replace(name, place)
        arguments.append(word)
    assert run(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
