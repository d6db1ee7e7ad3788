"""`aptvit finetune` and `aptvit heal` as a user runs them."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from skimage import data

import aptvit
from aptvit import cli
from aptvit.measuring.progress import ProgressLines

MODEL = "test_vit"
FAST = ("--set", "precision=float32", "--set", "workers=0", "--set", "per_image=true", "--set", "lr=1e-3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, array in {"cat": data.chelsea() // 2, "cup": 255 - data.coffee() // 3}.items():
        (root / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(array).crop((20 * i, 10 * i, 200 + 20 * i, 190 + 10 * i)).save(root / name / f"{i}.png")
    return root


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["aptvit", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_finetune_trains_resumes_and_reports(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "run"
    base = ("finetune", folder, "--model", MODEL, "--checkpoint", checkpoint, "--out", out, *FAST)
    options = (*base, "--batch-size", 4, "--keep", 0.6, "--set", "hold_back=0.2")
    assert run(monkeypatch, *options, "--epochs", 1) == 0
    output = capsys.readouterr()
    assert "top1" in output.out and str(out / "model") in output.out and "as fast as uniform" in output.err
    assert run(monkeypatch, *options, "--epochs", 2) == 2
    assert "continue it with --resume" in capsys.readouterr().err
    origin = (out / "run.json").read_text()
    assert run(monkeypatch, *options, "--epochs", 2, "--resume") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "00000003 was trained with other settings (epochs: 1 → 2)" in line and "--allow-changes" in line
    assert (out / "run.json").read_text() == origin
    assert run(monkeypatch, *options, "--allow-changes") == 2
    assert "add --resume" in capsys.readouterr().err
    assert run(monkeypatch, *options, "--epochs", 2, "--resume", "--allow-changes", "--json") == 0
    output = capsys.readouterr()
    results = json.loads(output.out)
    assert "changed since 3 updates: epochs: 1 → 2" in output.err
    assert json.loads((out / "run.json").read_text())["changes"] == [{"updates": 3, "changes": ["epochs: 1 → 2"]}]
    assert results["finished"] and results["updates"] == 6 and results["evaluations"][-1]["update"] == 6
    model = aptvit.from_pretrained(out / "model")
    assert model.keep == 0.6 and model.class_names == ["cat", "cup"]
    assert json.loads((out / "run.json").read_text())["classes"] == ["cat", "cup"]
    assert run(monkeypatch, "evaluate", out, "--rounds", 1, "--json") == 0
    (evaluation,) = json.loads(capsys.readouterr().out)
    assert evaluation["speedup"] > 0 and evaluation["share"] == 0.6
    for name, value in results["evaluations"][-1].items():
        if name not in ("update", "what"):
            assert evaluation[name] == pytest.approx(value, abs=1e-6)  # the saved model is the trained model
    options = ("--rounds", 1, "--max-images", 1, "--out", tmp_path / "evaluated", "--name", "one")
    assert run(monkeypatch, "evaluate", out, *options) == 0
    (row,) = json.loads((tmp_path / "evaluated" / "one.json").read_text())
    assert row["images"] == 1 < evaluation["images"]
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", out, "--methods", "tome", "--keeps", 0.5) == 2
    assert "--methods, --keeps: not used with the folder of a training" in capsys.readouterr().err


def test_a_recipe_that_leaves_new_classes_at_chance_is_refused(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    options = ("--model", MODEL, "--checkpoint", checkpoint, "--out", tmp_path / "run")
    assert run(monkeypatch, "finetune", folder, *options, "--recipe", "short") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the checkpoint does not have the 2 classes of the images" in line and "use --recipe new-head" in line


def test_the_data_is_told_and_splits_can_be_named(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (folder / "cup").rename(tmp_path / "cup")
    for split in ("spring", "summer"):
        shutil.copytree(folder / "cat", folder / split / "cat")
        shutil.copytree(tmp_path / "cup", folder / split / "cup")
    shutil.rmtree(folder / "cat")
    Image.new("RGB", (32, 32)).save(folder / "spring" / "loose.png")
    out, options = tmp_path / "run", ("--model", MODEL, "--checkpoint", checkpoint, "--set", "max_steps=1", *FAST)
    options = (*options, "--recipe", "full", "--batch-size", 4, "--set", "lr=1e-2", "--set", "lr_batch=0")
    assert run(monkeypatch, "finetune", folder, "--train", "spring", "--val", "summer", *options, "--out", out) == 0
    told = capsys.readouterr().err
    line = f"train: 12 images from {folder / 'spring'}, validation: 12 images from {folder / 'summer'}, 2 classes"
    assert line in told and "left out: 1 images are in no folder of a class" in told and "loose.png" in told
    assert json.loads((out / "run.json").read_text())["val_split"] == "summer"
    assert run(monkeypatch, "evaluate", out, "--rounds", 1, "--json") == 0
    capsys.readouterr()
    for words, message in (((), "DATA is missing"), (("--train", "nowhere"), "nowhere does not exist")):
        assert run(monkeypatch, "finetune", *words, *options, "--out", tmp_path / "other") == 2
        assert message in capsys.readouterr().err


def test_heal_needs_no_labels(folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (folder / "cat" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (-1.0, time.monotonic))  # a line for each step
    out = tmp_path / "healed"
    options = ("--model", MODEL, "--checkpoint", checkpoint, "--out", out, "--keep", 0.5, "--set", "epochs=1")
    assert run(monkeypatch, "heal", folder, *options, "--json") == 0
    output = capsys.readouterr()
    results = json.loads(output.out)
    assert {line["share"] for line in results["evaluations"]} == {0.5, 0.67, 0.83}
    assert all(0 <= line["agreement"] <= 1 and "top1" not in line for line in results["evaluations"])
    assert "broken.jpg" in output.err
    for line in ("training the scorer, batches: 1 of 1", "calibrating thresholds, batches: 1 of 1", "timing: 1 of 4"):
        assert line in output.err
    assert run(monkeypatch, "evaluate", out, "--rounds", 1, "--json") == 0
    (evaluation,) = json.loads(capsys.readouterr().out)
    reported = [line for line in results["evaluations"] if line["share"] == 0.5][-1]
    for name in ("agreement", "divergence", "kept", "images"):  # of the weights that are kept in the end
        assert evaluation[name] == pytest.approx(reported[name], abs=1e-6)
    model = aptvit.from_pretrained(out / "model")
    assert model.keep == 0.5 and model.patchifier.scorer_name == "glance" and model.num_classes == 10
    logits = model(torch.rand(2, 3, 160, 160))
    assert logits.shape == (2, 10)


def test_print_config_prints_the_recipe_and_does_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "run"
    options = ("--recipe", "full", "--keep", 0.4, "--set", "lr=1e-2", "--out", out, "--print-config")
    assert run(monkeypatch, "finetune", folder, *options) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["keep"], values["lr"], values["layer_decay"]) == (0.4, 1e-2, 0.75) and not out.exists()
    assert run(monkeypatch, "heal", folder, "--minutes", 3, "--print-config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["max_minutes"] == 3
    assert run(monkeypatch, "heal", folder, "--method", "tome", "--print-config") == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["method"], values["features_weight"], values["pooled_weight"]) == ("tome", 0, 1)


def test_a_baseline_is_healed_by_the_same_command(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    options = ("--model", MODEL, "--checkpoint", checkpoint, "--keep", 0.5, "--set", "max_steps=1")
    assert run(monkeypatch, "heal", folder, "--method", "downscale", *options, "--out", tmp_path / "run", "--json") == 0
    before, after = json.loads(capsys.readouterr().out)["evaluations"]
    assert before["kept"] == after["kept"] == pytest.approx(0.5, abs=0.1)
    assert before["divergence"] > 0 and after["update"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("finetune", "nowhere"), "nowhere does not exist"),
        (("finetune", "FOLDER", "--recipe", "long"), "there is no recipe 'long'"),
        (("finetune", "FOLDER", "--set", "rate=1"), "has no setting 'rate'"),
        (("finetune", "FOLDER", "--keep", "2"), "keep=2 must be between 0 and 1"),
        (("finetune", "FOLDER/cat"), "has no classes"),
        (("finetune", "FOLDER", "--model", "vit_base_patch16_38"), "timm has no model"),
        (("heal", "FOLDER", "--out", "/proc/x"), "cannot write to /proc/x"),
        (("heal", "FOLDER"), "needs trained weights"),
    ],
)
def test_wrong_values_print_one_line_with_exit_code_2(
    folder: Path, tmp_path: Path, words: tuple[str, ...], message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda name, timeout: False)
    arguments = [word.replace("FOLDER", str(folder)) for word in words]
    arguments += [] if "--model" in arguments else ["--model", MODEL]
    assert run(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_training_that_is_stopped_ends_with_130_and_continues(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from aptvit.training.stopping import StopSignals

    out = tmp_path / "run"
    words = ("finetune", folder, "--model", MODEL, "--checkpoint", checkpoint, "--out", out, *FAST)
    enter = StopSignals.__enter__

    def enter_and_stop(self: StopSignals) -> StopSignals:
        self.requested = True
        return enter(self)

    monkeypatch.setattr(StopSignals, "__enter__", enter_and_stop)
    assert run(monkeypatch, *words, "--json") == 130
    output = capsys.readouterr()
    assert not json.loads(output.out)["finished"] and "the same command and --resume" in output.err.replace("\n", " ")
    monkeypatch.undo()
    assert run(monkeypatch, *words, "--resume") == 0
    assert (out / "model").is_dir()


def test_a_run_folder_of_0_1_is_evaluated_and_resumed(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Its recipe.yaml lists the settings of all tasks."""
    out = tmp_path / "run"
    words = ("finetune", folder, "--model", MODEL, "--checkpoint", checkpoint, "--out", out, *FAST)
    assert run(monkeypatch, *words, "--keep", 0.6, "--set", "hold_back=0.2") == 0
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert "cascade" not in saved and "temperature" not in saved
    of_0_1 = json.loads((Path(__file__).parents[1] / "data" / "recipes_of_0_1.json").read_text())["short"]
    (out / "recipe.yaml").write_text(yaml.safe_dump({**of_0_1, **saved}))
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", out, "--rounds", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["share"] == 0.6
    options = ("--recipe", out / "recipe.yaml", "--epochs", 2, "--resume", "--allow-changes", "--json")
    assert run(monkeypatch, *words, *options) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["finished"] and results["updates"] == 2 * -(-results["updates"] // 2)
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == {**saved, "epochs": 2}


def test_heal_keeps_the_validation_split_apart(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    splits = tmp_path / "splits"
    for split, name in (("Training", "cat"), ("dev", "cup")):
        shutil.copytree(folder / name, splits / split / name)
    options = ("--model", MODEL, "--checkpoint", checkpoint, "--keep", 0.5, "--set", "max_steps=1")
    for given in ((), ("--train", "dev", "--val", "Training")):
        out = tmp_path / f"healed{len(given)}"
        assert run(monkeypatch, "heal", splits, *options, "--out", out, *given) == 0
        train, val = (splits / name for name in (("dev", "Training") if given else ("Training", "dev")))
        assert f"train: 6 images from {train}, validation: 6 images from {val}" in capsys.readouterr().err
    assert run(monkeypatch, "heal", splits, folder, *options, "--out", tmp_path / "both", "--val", "dev") == 2
    assert "give that folder alone" in capsys.readouterr().err
