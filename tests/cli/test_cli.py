"""The command line as a user runs it: output, files, and errors."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from sklearn.datasets import load_sample_images

from aptvit import cli
from aptvit.hosts import pretrained as hosts

MODEL = "test_vit"  # timm's smallest ViT: 160 pixels, patches of 16


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_weights_at_hand", lambda name, timeout: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four images."""
    images = tmp_path / "images"
    images.mkdir()
    arrays = [data.astronaut(), data.coffee(), *load_sample_images().images]
    for name, array in zip(("astronaut", "coffee", "china", "flower"), arrays, strict=True):
        Image.fromarray(array).resize((240, 200)).save(images / f"{name}.jpg")
    return images


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model(MODEL).state_dict(), path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["aptvit", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Return the line that a wrong command prints with exit code 2."""
    assert run(monkeypatch, *args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if line and not line.startswith("The hub gave no weights")]
    assert len(lines) == 1, output.err
    return lines[0]


def test_compare_prints_a_table_and_writes_a_report(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert run(monkeypatch, "compare", folder, "--model", MODEL, "--rounds", 1, "--out", out) == 0
    output = capsys.readouterr()
    printed = output.out
    assert "The hub gave no weights" in output.err
    for expected in ("patch tokens", "GFLOPs", "images/s", "speed-up", "eta", str(out / "index.html")):
        assert expected in printed
    page = (out / "index.html").read_text()
    assert page.count("<img") >= 8 and "astronaut.jpg" in page


def test_compare_meets_the_target_and_reports_it_as_json(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", MODEL, "--rounds", 2, "--json", "--out", tmp_path / "r")
    assert run(monkeypatch, "compare", folder, *options, "--keep", 0.6) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["keep_ratio"] == pytest.approx(0.6, abs=0.02)
    assert result["agreement"] is None and result["weights"] == "random"
    assert len(result["seconds_uniform"]) == len(result["seconds_adaptive"]) == 2
    assert result["eta"] == pytest.approx(result["speedup"] / result["flop_ratio"])
    assert run(monkeypatch, "compare", folder, *options, "--keep", 0.6, "--per-image") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["keep_spread"][0] == result["keep_spread"][1] == pytest.approx(0.6, abs=0.02)


def test_thresholds_take_all_numbers_that_follow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("compare", folder, "--model", MODEL, "--rounds", 1, "--json", "--out", tmp_path / "r")
    for words in (("--thresholds", 5.5, 4.0), ("--thresholds", "5.5,4"), ("--thresholds=5.5 4.0",)):
        assert run(monkeypatch, *base, *words) == 0
        assert json.loads(capsys.readouterr().out)["thresholds"] == [5.5, 4.0]
    assert run(monkeypatch, *base, "--thresholds", "-1") == 0
    assert json.loads(capsys.readouterr().out)["keep_ratio"] == 1


def test_with_a_checkpoint_agreement_and_accuracy_are_shown(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.csv"
    with labels.open("w", newline="") as lines:
        csv.writer(lines).writerows([("file", "class_index"), *((p.name, 1) for p in folder.iterdir())])
    options = ("--checkpoint", checkpoint, "--labels", labels, "--thresholds", "-1", "--rounds", 1, "--json")
    assert run(monkeypatch, "compare", folder, "--model", MODEL, *options, "--out", tmp_path / "r") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["agreement"] == 1 and result["cosine"] == pytest.approx(1, abs=1e-4)
    assert result["top1_uniform"] == result["top1_adaptive"] is not None


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision(
    dtype: str, folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ("--checkpoint", checkpoint, "--thresholds", "-1", "--rounds", 1, "--json", "--dtype", dtype)
    assert run(monkeypatch, "compare", folder, "--model", MODEL, *options, "--out", tmp_path / "r") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dtype"] == dtype and result["cosine"] > 0.99


def unusual_files(folder: Path) -> None:
    """Write images of unusual sizes, modes and orientations."""
    image = Image.fromarray(data.chelsea()).resize((120, 80))
    Image.fromarray(np.full((1, 1, 3), 200, np.uint8)).save(folder / "dot.png")
    Image.fromarray((np.arange(80 * 120).reshape(80, 120) * 6).astype(np.uint16)).save(folder / "deep.png")
    image.convert("L").save(folder / "gray.png")
    image.convert("CMYK").save(folder / "print.jpg")
    image.convert("RGBA").save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    Image.new("1", (12500, 8000), 1).save(folder / "huge.png")


def test_unusual_files_are_read_and_broken_ones_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unusual_files(folder)
    whole = (folder / "china.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    options = ("--model", MODEL, "--rounds", 1, "--json", "--out", tmp_path / "r")
    assert run(monkeypatch, "compare", folder, *options) == 1
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["num_photos"] == 11
    assert len(result["skipped"]) == 1 and "cut.jpg" in result["skipped"][0]
    assert "cut.jpg" in output.err.replace("\n", "")


def test_show_draws_each_image_and_its_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.jpg").write_text("not an image")
    out = tmp_path / "patches"
    assert run(monkeypatch, "show", folder, "--out", out, "--keep", 0.5, "--scales", 3, "--scores", "--json") == 1
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert {Path(p["path"]).name for p in result["pictures"]} == {
        "astronaut.png",
        "coffee.png",
        "china.png",
        "flower.png",
    }
    assert np.mean([p["keep_ratio"] for p in result["pictures"]]) == pytest.approx(0.5, abs=0.02)
    assert "text.jpg" in output.err.replace("\n", "")
    for row in result["pictures"]:
        with Image.open(row["path"]) as drawn:
            assert drawn.width > 2.5 * drawn.height  # patches, and the maps of two scales, side by side


def test_images_of_the_same_name_do_not_overwrite_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(data.rocket()).save(other / "china.png")
    out = tmp_path / "patches"
    assert run(monkeypatch, "show", folder / "china.jpg", other, "--out", out, "--thresholds", 5.5) == 0
    assert sorted(p.name for p in out.iterdir()) == ["china-2.png", "china.png"]


def test_models_lists_what_can_be_adapted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "models", "*dinov3*", "--json") == 0
    rows = [row for row in json.loads(capsys.readouterr().out) if row["library"] == "timm"]
    assert len(rows) >= 9 and all(row["adaptable"] and "rotary" in row["positions"] for row in rows)
    assert run(monkeypatch, "models", "samvit", "--json") == 0
    assert all("VisionTransformerSAM" in row["reason"] for row in json.loads(capsys.readouterr().out))
    assert run(monkeypatch, "models", "deit_tiny", "--markdown") == 0
    assert "| `deit_tiny_distilled_patch16_224` |" in capsys.readouterr().out


def test_benchmark_prints_a_table_and_writes_numbers_and_plots(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    options = ("--models", MODEL, "--sizes", "96,128", "--keeps", "1.0,0.6", "--batch-sizes", "2", "--rounds", 2)
    assert run(monkeypatch, "benchmark", folder, *options, "--out", out, "--name", "here", "--device", "cpu") == 0
    printed = capsys.readouterr()
    for expected in ("FLOP ratio", "speed-up", "eta", f"{MODEL} at 96 px", str(out / "here.json")):
        assert expected in printed.out
    assert printed.err.count("times faster") == 4  # one line for each case, as it is done
    record = json.loads((out / "here.json").read_text())
    assert len(record["rows"]) == 4 and record["commands"][0].startswith("aptvit benchmark")
    assert {row["case"]["size"] for row in record["rows"]} == {96, 128}
    assert all(row["rounds"] == 2 for row in record["rows"])
    page = (out / "here.md").read_text()
    assert "## Inference" in page and "## Nothing merged" in page and record["commands"][0] in page
    for kind in ("eta", "growth"):
        assert f"{MODEL}" in (out / f"here-{kind}.svg").read_text()


def test_benchmark_continues_and_needs_neither_images_nor_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = (
        "--models",
        MODEL,
        "--sizes",
        96,
        "--batch-sizes",
        2,
        "--rounds",
        1,
        "--out",
        tmp_path,
        "--device",
        "cpu",
    )
    assert run(monkeypatch, "benchmark", *options, "--keeps", "1.0", "--first", 2) == 0
    printed = capsys.readouterr()
    assert "aptvit[plot]" in printed.err and "times faster" in printed.err
    before = (tmp_path / "cpu.json").read_text()
    assert run(monkeypatch, "benchmark", *options, "--keeps", "1.0", "--first", 2) == 0
    assert "times faster" not in capsys.readouterr().err and (tmp_path / "cpu.json").read_text() == before
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["cpu.json", "cpu.md"]


def test_benchmark_names_the_extra_with_the_sample_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert "aptvit[demo]" in refused(monkeypatch, capsys, "benchmark", "--out", tmp_path)


def test_errors_of_benchmark(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*options: object) -> str:
        words = ("benchmark", folder, "--models", MODEL, "--out", tmp_path / "b", "--name", "x", "--device", "cpu")
        return refused(monkeypatch, capsys, *words, *options)

    assert "did you mean vit_base_patch16_384" in error_of("--models", f"{MODEL},vit_base_patch16_38")
    assert "keep=1.5" in error_of("--keeps", "0.5,1.5") and "keep=0" in error_of("--keeps", "0")
    assert "batch=0" in error_of("--batch-sizes", "0") and "size=-1" in error_of("--sizes", "-1")
    assert "give numbers" in error_of("--batch-sizes", "many") and "--keeps is empty" in error_of("--keeps", ",")
    assert "dtype='int8'" in error_of("--dtypes", "int8")
    assert "loss scaler" in error_of("--dtypes", "float16", "--training")
    assert not list((tmp_path / "b").iterdir())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no images" in refused(monkeypatch, capsys, "benchmark", empty, "--out", tmp_path / "b")
    (empty / "a.jpg").write_text("x")
    assert "none of 1 files" in refused(monkeypatch, capsys, "benchmark", empty, "--out", tmp_path / "b")
    (tmp_path / "b" / "x.json").write_text("{")
    assert "does not hold a benchmark" in error_of()


@pytest.mark.parametrize(
    "command", [info.callback.__name__.replace("_", "-") for info in cli.app.registered_commands if not info.hidden]
)
def test_help_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert f"Example: aptvit {command}" in " ".join(capsys.readouterr().out.split())


def test_errors_are_a_line_that_names_the_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*args: object) -> str:
        return refused(monkeypatch, capsys, *args)

    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    assert "empty" in error_of("compare", empty, "--out", tmp_path / "r")
    assert "nowhere" in error_of("show", tmp_path / "nowhere", "--out", tmp_path / "r")
    assert "did you mean vit_base_patch16_384" in error_of(
        "compare", folder, "--model", "vit_base_patch16_38", "--out", tmp_path / "r"
    )
    assert "augreg" in error_of("compare", folder, "--model", "vit_base_patch16_384.nope", "--out", tmp_path / "r")
    assert "cannot adapt" in error_of("compare", folder, "--model", "cait_xxs24_224", "--out", tmp_path / "r")
    assert "--out" in error_of("show", folder, "--out", tmp_path / "file" / "x")
    assert "--checkpoint" in error_of(
        "compare", folder, "--model", MODEL, "--checkpoint", tmp_path / "none", "--out", tmp_path / "r"
    )
    assert "does not fit" in error_of(
        "compare", folder, "--model", MODEL, "--checkpoint", tmp_path / "file", "--out", tmp_path / "r"
    )
    assert "one threshold for each size" in error_of(
        "compare", folder, "--thresholds", 5, 4, "--scales", 2, "--out", tmp_path / "r"
    )
    assert "give one" in error_of("show", folder, "--thresholds", 5, "--keep", 0.5, "--out", tmp_path / "r")
    assert "give numbers" in error_of("show", folder, "--thresholds", "five", "--out", tmp_path / "r")
    assert "keep=1.5" in error_of("show", folder, "--keep", 1.5, "--out", tmp_path / "r")
    assert "cannot be reached" in error_of("show", folder, "--keep", 0.01, "--scales", 2, "--out", tmp_path / "r")
    assert "cannot be used" in error_of("compare", folder, "--device", "cuda:99", "--out", tmp_path / "r")
    assert "columns file and class_index" in error_of(
        "compare", folder, "--labels", tmp_path / "file", "--model", MODEL, "--out", tmp_path / "r"
    )
    assert "no Vision Transformer" in error_of("models", "resnet50_nothing")
    (empty / "a.jpg").write_text("x")
    (empty / "b.jpg").write_text("x")
    assert "none of 2 files" in error_of("compare", empty, "--model", MODEL, "--out", tmp_path / "r")


def test_show_explains_the_patch_of_a_pixel(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = folder / "china.jpg", tmp_path / "out"  # 240 x 200 pixels, resized to 384 x 320
    base = ("show", file, "--out", out, "--thresholds", 5.5, 5.0)
    assert run(monkeypatch, *base, "--json") == 0
    assert "why" not in json.loads(capsys.readouterr().out)["pictures"][0]
    plain = np.asarray(Image.open(out / "china.png")).astype(int)
    sizes = set()
    for x, y in ((5, 5), (120, 150), (200, 60), (239, 199)):
        assert run(monkeypatch, *base, "--why", f"{x},{y}", "--json") == 0
        (row,) = json.loads(capsys.readouterr().out)["pictures"]
        why = row["why"]
        assert (why["x"], why["y"]) == (x * 384 // 240, y * 320 // 200) and why["rule"] == "thresholds"
        (patch,) = (candidate for candidate in why["candidates"] if candidate["chosen"])
        assert patch["left"] <= why["x"] < patch["left"] + patch["size"]
        assert patch["top"] <= why["y"] < patch["top"] + patch["size"]
        allowed = [c["size"] for c in why["candidates"] if c["score"] is not None and c["score"] < c["limit"]]
        assert patch["size"] == max(allowed, default=16)
        sizes.add(patch["size"])
        # Only the frame of that patch is drawn differently: the drawing is twice as large as the image.
        changed = np.argwhere((np.asarray(Image.open(row["path"])).astype(int) != plain).any(-1))
        (top, left), (bottom, right) = changed.min(0), changed.max(0)
        side = 2 * patch["size"]
        assert (top, left, bottom - top + 1, right - left + 1) == (2 * patch["top"], 2 * patch["left"], side, side)
        assert run(monkeypatch, *base, "--why", f"{x},{y}") == 0
        text = capsys.readouterr().out
        assert f"in a patch of {patch['size']} x {patch['size']} pixels" in text and "threshold" in text
        assert all(f"{c['score']:.4g}" in text for c in why["candidates"] if c["score"] is not None)
        assert text.count("this patch") == 1
    assert len(sizes) > 1
    assert run(monkeypatch, "show", file, "--out", out, "--keep", 0.5, "--per-image", "--why", "9,9") == 0
    assert "merges in this image" in capsys.readouterr().out
    assert "outside" in refused(monkeypatch, capsys, *base, "--why", "240,0")


def test_json_output_and_exit_codes(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: dict[str, tuple[object, ...]] = {
        "compare": (folder, "--model", MODEL, "--rounds", 1),
        "show": (folder,),
        "calibrate": (folder, "--model", MODEL),
        "benchmark": (folder, "--models", MODEL, "--keeps", 0.6, "--batch-sizes", 2, "--rounds", 1, "--first", 2),
        "evaluate": (folder, "--model", MODEL, "--checkpoint", checkpoint, "--keeps", 0.6, "--methods", "random"),
        "embed": (folder, "--model", MODEL, "--checkpoint", checkpoint),
        "export": (folder, "--model", MODEL, "--format", "torch-export"),
        "models": ("deit_tiny",),
        "finetune": (folder, "--print-config"),
        "heal": (folder, "--print-config"),
        "train-detector": (folder, "--print-config"),
        "train-segmenter": (folder, "--print-config"),
    }
    monkeypatch.chdir(tmp_path)
    for name, words in commands.items():
        assert run(monkeypatch, name, *words, "--json") == 0, name
        output = capsys.readouterr()
        json.loads(output.out)
        written = [path.name for path in tmp_path.iterdir() if path.name not in ("images", "weights.safetensors")]
        prints_only = name == "models" or "--print-config" in words
        assert written == ([] if prints_only else [name]), name  # the folder named after the command
        if written:
            shutil.rmtree(tmp_path / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    for name in ("compare", "show", "calibrate", "embed"):
        assert run(monkeypatch, name, *commands[name], "--json") == 1, name
        output = capsys.readouterr()
        json.loads(output.out)
        assert "broken.jpg" in output.err.replace("\n", "") or name == "embed"


def test_an_interrupted_command_ends_with_130(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aptvit.report.patches.show_patches", interrupt)
    assert run(monkeypatch, "show", folder, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().out == ""
