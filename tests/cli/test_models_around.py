"""Commands with models of transformers around a ViT: plain folders, and folders that `calibrate` wrote."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import class_folders
import numpy as np
import pytest
import torch
import transformers
from models.around_hosts import SMALL, make
from PIL import Image
from transformers import PreTrainedTokenizerFast

import aptvit
from aptvit import cli
from aptvit.demo.demo_model import DemoModel, Settings

SIDE = {"height": 128, "width": 128}


@dataclass(frozen=True)
class Setup:
    """A kind of model.

    Attributes:
        host: Name in `models.around_hosts`, or a function that makes it.
        processor: Makes its processor; None for a folder without one.
        likeness_of: What the report tells of its answers.
        options: Of commands.
    """

    host: str | Callable[[], Any]
    processor: Callable[[], Any] | None
    likeness_of: str | None
    options: tuple[str, ...] = ()


def classifier() -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=64, patch_size=8, num_labels=5)
    ).eval()


def with_sure_boxes(name: str) -> Callable[[], Any]:
    def build() -> Any:
        host = make(name).host
        head = host.class_embed if hasattr(host, "class_embed") else None
        if isinstance(head, torch.nn.Linear):
            torch.nn.init.zeros_(head.bias)
        return host

    return build


BOXES, REGIONS = "boxes that both find (F1 at IoU 0.5)", "pixels of the same class"
MAPS, POINTS = "correlation of the maps", "points within 5 % of the image's sides"
SQUARE: dict[str, Any] = {"size": SIDE, "crop_size": SIDE}
SETUPS = {
    "depth": Setup(
        "depth_anything",
        lambda: transformers.DPTImageProcessor(
            size={"height": 112, "width": 112}, keep_aspect_ratio=True, ensure_multiple_of=14
        ),
        MAPS,
    ),
    "detector": Setup(with_sure_boxes("rf_detr"), lambda: transformers.DetrImageProcessor(size=SIDE), BOXES),
    "queries": Setup(
        "eomt",
        lambda: transformers.EomtImageProcessor(size={"shortest_edge": 128, "longest_edge": 128}, do_pad=True),
        REGIONS,
    ),
    "segmenter": Setup(
        "upernet", lambda: transformers.SegformerImageProcessor(size={"height": 112, "width": 112}), REGIONS
    ),
    "poses": Setup("vitpose", lambda: transformers.VitPoseImageProcessor(size={"height": 128, "width": 96}), POINTS),
    "vocabulary": Setup(
        "owlvit", lambda: transformers.OwlViTImageProcessor(**SQUARE), BOXES, ("--text", "a cat, a cup")
    ),
    "prompted": Setup("clipseg", lambda: transformers.ViTImageProcessor(size=SIDE), MAPS, ("--text", "a cat")),
    "maps": Setup("dinov3_backbone", None, None),
    "classifier": Setup(classifier, lambda: transformers.ViTImageProcessor(size={"height": 64, "width": 64}), None),
    "tower": Setup("vit_msn", None, None),
}


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "cat": 2, "cup": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="cup", model_max_length=8
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            setup, made[name] = SETUPS[name], tmp_path_factory.mktemp(name)
            host = make(setup.host).host if isinstance(setup.host, str) else setup.host()
            host.save_pretrained(made[name])
            if setup.processor is not None:
                setup.processor().save_pretrained(made[name])
            if setup.options:
                tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    for number, path in enumerate(sorted(class_folders.cats_and_cups(folder / "all").rglob("*.png"))[:4]):
        side = 150 + 10 * number
        Image.open(path).convert("RGB").resize((side, 200)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aptvit", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return command


@pytest.mark.parametrize("name", SETUPS)
def test_compare(name: str, folder_of: Any, images: Path, run: Any, tmp_path: Path) -> None:
    """With nothing merged the answers are the same; with half of the tokens the page shows both and the difference."""
    files = [images / f"{number}.png" for number in range(4)]
    words = ("compare", *files, "--model", folder_of(name), *SETUPS[name].options, "--json", "--rounds", 1)
    code, text, errors = run(*words, "--thresholds", -1, "--out", tmp_path / "same")
    assert code == 0, errors
    same = json.loads(text)
    assert same["cosine"] == pytest.approx(1, abs=1e-4) and same["keep_ratio"] == 1
    assert same["likeness_of"] == SETUPS[name].likeness_of
    assert same["likeness"] == (None if SETUPS[name].likeness_of is None else pytest.approx(1, abs=1e-4))
    assert same["num_photos"] == 4 and same["agreement"] == (1 if name == "classifier" else None)
    code, text, errors = run(*words, "--keep", 0.5, "--per-image", "--out", tmp_path / "half")
    assert code == 0, errors
    half, page = json.loads(text), (tmp_path / "half" / "index.html").read_text()
    assert half["keep_ratio"] == pytest.approx(0.5, abs=0.06) and half["flop_ratio"] > 1
    shown = page.count("where they differ")
    assert shown == page.count("answer of the adaptive model") == (4 if SETUPS[name].likeness_of else 0)
    assert "--img-size" not in page


def test_images_are_read_by_the_processor(folder_of: Any, images: Path) -> None:
    """Pixels, sizes and normalisation are those of the processor alone, to half a level of the pixels."""
    from aptvit.api import load_any
    from aptvit.files.batches import NormalisedBatches, read_images

    for name in ("depth", "detector", "segmenter", "vocabulary", "classifier"):
        folder = folder_of(name)
        host = load_any(str(folder), text=["a cat"] if name == "vocabulary" else [])
        paths = [images / f"{number}.png" for number in range(4)]
        batches = NormalisedBatches(read_images(paths, host.data, transform=host.read).pixels, host.data, 8, "cpu")
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        got = [image for batch in batches for image in batch]
        for image, path in zip(got, paths, strict=True):
            expected = processor(images=Image.open(path), return_tensors="pt")["pixel_values"][0]
            assert image.shape == expected.shape
            assert (image - expected).abs().max() < 0.51 / 255 / min(processor.image_std) + 1e-5
        assert len({image.shape for image in got}) == (3 if name == "depth" else 1)


def test_calibrated_it_is_a_folder_that_other_commands_take(
    folder_of: Any, images: Path, run: Any, tmp_path: Path
) -> None:
    source, saved = folder_of("depth"), tmp_path / "adaptive"
    code, _, errors = run("calibrate", images, "--model", source, "--keep", 0.6, "--out", saved)
    assert code == 0, errors
    host = transformers.DepthAnythingForDepthEstimation.from_pretrained(saved)  # without aptvit
    processor = transformers.AutoImageProcessor.from_pretrained(saved)
    model = aptvit.from_pretrained(saved)
    pixels = processor(images=Image.open(images / "0.png"), return_tensors="pt")["pixel_values"]
    assert model.aptvit.thresholds is not None and 0.2 < model.aptvit.layout(pixels).keep_ratio < 1
    with torch.no_grad():
        assert torch.equal(model(pixels, keep=1.0).predicted_depth, host(pixels).predicted_depth)
    code, text, errors = run("compare", images, "--model", saved, "--json", "--rounds", 1, "--out", tmp_path / "report")
    assert code == 0, errors
    result = json.loads(text)
    assert result["budget"].endswith("as saved") and result["keep_ratio"] == pytest.approx(0.6, abs=0.02)
    assert result["thresholds"] == pytest.approx(model.aptvit.thresholds)
    for command in (("evaluate", images), ("export", images), ("embed", images), ("finetune", images)):
        code, _, errors = run(*command, "--model", saved, "--out", tmp_path / "refused")
        assert code == 2 and len(errors.strip().splitlines()) == 1 and "around a ViT" in errors, (command, errors)
    code, _, errors = run("calibrate", images, "--model", source, "--keep", 0.6, "--out", tmp_path / "config.json")
    assert code == 2 and "give --out a folder" in errors


def test_benchmark(folder_of: Any, images: Path, run: Any, tmp_path: Path) -> None:
    words = ("--keeps", "1.0,0.5", "--batch-sizes", 2, "--rounds", 1, "--json", "--out", tmp_path)
    code, text, errors = run("benchmark", images / "0.png", images / "1.png", "--models", folder_of("detector"), *words)
    assert code == 0, errors
    whole, half = json.loads(text)["rows"]
    assert whole["keep_mean"] == 1 and half["keep_mean"] == pytest.approx(0.5, abs=0.02)
    assert half["gflops_adaptive"] < half["gflops_uniform"] == whole["gflops_uniform"]
    code, _, errors = run(
        "benchmark", images / "0.png", "--models", folder_of("detector"), "--training", "--out", tmp_path / "training"
    )
    assert code != 0 and "leave out --training" in errors


@pytest.mark.parametrize("name", ["depth", "detector", "classifier"])
def test_demo(name: str, folder_of: Any, images: Path) -> None:
    """What the page shows is what both models answer in Python."""
    model = DemoModel(str(folder_of(name)))
    image = model.read(images / "0.png")
    settings = Settings(keep=0.5, scales=2)
    view, result = model.view(image, settings), model.predict(image, settings)
    assert view.tokens < view.tokens_uniform and (view.gflops is None) == (name != "classifier")
    space: dict[str, Any] = {}
    normalised = model.host.run.__globals__  # noqa: F841
    x = (
        aptvit.adapt(model.uniform, keep=0.5, check=False).aptvit.normalization.normalised(image[None])
        if (name != "classifier")
        else None
    )
    if x is not None:
        space["images"] = x
        code = model.snippet(settings)
        assert str(folder_of(name)) in code and "transformers" in code
        with torch.no_grad():
            exec(code, space)
        assert result.likeness is not None and result.drawings is not None and 0 <= result.likeness[1] <= 1
        uniform = model.uniform(pixel_values=x)
        if name == "depth":
            expected = np.corrcoef(
                uniform.predicted_depth.detach().ravel(), space["output"].predicted_depth.detach().ravel()
            )[0, 1]
            assert result.likeness[1] == pytest.approx(expected, abs=1e-4)
    else:
        assert result.top is not None and result.top_uniform is not None and len(result.top) == 5


REFUSED = {
    "trocr": "writes text",
    "video_mae": "reads clips",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_in_a_line(
    name: str, images: Path, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(name).host.save_pretrained(tmp_path / "model")
    capsys.readouterr()  # its progress bar
    code, _, errors = run("compare", images, "--model", tmp_path / "model", "--out", tmp_path / "report")
    assert code == 2 and REFUSED[name] in errors and len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, "give 1 to 16,384"),
        ("preprocessor_config.json", {"size": {"height": -5, "width": 3}}, "give 1 to 16,384"),
        ("preprocessor_config.json", {"size": 0}, "give 1 to 16,384"),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "other types than numbers"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "does not scale pixels to 0..1"),
        ("preprocessor_config.json", {"image_std": [0.0] * 3}, "must be above 0"),
        ("preprocessor_config.json", {"image_mean": [0.5] * 2}, "2 values for 3 channels"),
        ("config.json", {"patch_size": 0}, "does not run on an image of its processor"),
        ("config.json", {"architectures": []}, "names no class"),
        ("config.json", {"architectures": ["Trainer"]}, "has no model 'Trainer'"),
    ],
)
def test_damaged_folders_are_refused_in_a_line(
    file: str, changes: dict[str, Any], reason: str, folder_of: Any, images: Path, run: Any, tmp_path: Path
) -> None:
    shutil.copytree(folder_of("depth"), tmp_path / "model")
    content = json.loads((tmp_path / "model" / file).read_text())
    (tmp_path / "model" / file).write_text(json.dumps(content | changes))
    code, _, errors = run("compare", images, "--model", tmp_path / "model", "--out", tmp_path / "report")
    assert code == 2 and reason in errors and len(errors.strip().splitlines()) == 1, errors


def test_wrong_options_are_refused_in_a_line(folder_of: Any, images: Path, run: Any, tmp_path: Path) -> None:
    depth, vocabulary = folder_of("depth"), folder_of("vocabulary")
    for words, reason in (
        (("--model", depth, "--text", "a cat"), "takes no text"),
        (("--model", depth, "--img-size", 224), "leave out --checkpoint and --img-size"),
        (("--model", vocabulary), 'give --text "a cat,a dog"'),
        (("--model", folder_of("prompted"), "--text", "a,b"), "looks for one text"),
        (("--model", vocabulary, "--text", ", ,"), "--text is empty"),
        (("--model", "vit_tiny_patch16_224", "--text", "a cat"), "takes no text"),
        (("--model", "owner/no-such-model"), "there is no folder owner/no-such-model"),
    ):
        code, _, errors = run("compare", images, *words, "--out", tmp_path / "report")
        assert code == 2 and reason in errors and len(errors.strip().splitlines()) == 1, (words, errors)
