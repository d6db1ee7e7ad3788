"""Every snippet in README and docs: Python runs from top to bottom of its page, commands are ones that exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shapes
import timm
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import aptvit
from aptvit.cli import app
from aptvit.dense.saved import save as save_dense
from aptvit.files.sample_photos import sample_photos
from aptvit.models.checkpoints import settings_of

MODEL = "test_vit"  # timm's smallest: 160 pixels, patches of 16
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Models, pictures and times that a test can afford; the words of the page otherwise.
SMALLER = {"img_size=1536": "img_size=128", "image_size=1536": "image_size=128", "crop=512": "crop=128"}
SMALLER |= {"window_size=32": "window_size=4", "window_size=16": "window_size=4", "gflops=30": "gflops=0.03"}
SMALLER |= {'load_host("vit_base_patch16_384")': 'load_host("vit_base_patch16_384", img_size=128)'}
SMALLER |= {
    'load_recipe("heal", {"keep": 0.5})': 'load_recipe("heal", {"keep": 0.5, "max_minutes": 0.02, "batch_size": 4})'
}


def snippets(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def pages_with(*languages: str) -> list[Any]:
    found = [page for page in PAGES if any(language in languages for language, _ in snippets(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


def small_vit(create: Callable[..., Any], name: str, pretrained: bool = False, **options: Any) -> Any:
    return create(name, **{"embed_dim": 64, "num_heads": 2, "img_size": 128, **options}).eval()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrained models are small ones with random weights."""
    transformers = pytest.importorskip("transformers")
    import tiny_llava

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: small_vit(create, name, **options))
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: True)
    dino = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    made = {
        "AutoModel": lambda *_: transformers.Dinov2Model(transformers.Dinov2Config(**dino)).eval(),
        "AutoImageProcessor": lambda *_: transformers.BitImageProcessor(
            size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
        ),
        "AutoProcessor": lambda *_: tiny_llava.make_processor(),
        "LlavaForConditionalGeneration": lambda *_: tiny_llava.make_llava(),
    }
    for name, make in made.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", staticmethod(make))


def given(page: str) -> dict[str, Any]:
    """What a page takes for granted."""
    pictures = [Image.fromarray(one).resize((128, 128)) for one in list(sample_photos().values())[:2]]
    images = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures])
    names: dict[str, Any] = {"aptvit": aptvit, "timm": timm, "torch": torch, "images": images, "frames": images}
    names |= {
        "sample_images": images,
        "batches": [images],
        "prompts": ["USER : <image> what is this ? ASSISTANT :"] * 2,
    }
    if page == "README.md":
        names["image_processor"] = lambda images, return_tensors: {"pixel_values": images[:, :, :112, :112] / 255}
    elif page == "docs/towers.md":
        names |= {"images": pictures}
    elif page == "docs/dense.md":
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=12, num_attention_heads=2, image_size=112, patch_size=14
        )
        boxes, masks = torch.tensor([[10.0, 10, 50, 60]]), torch.zeros(1, 128, 128, dtype=torch.uint8)
        masks[:, 10:60, 10:50] = 1
        names |= {
            "images": [one.float() / 255 for one in images],
            "batch": images.float() / 255,
            "image": images[0].float() / 255,
            "targets": [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}] * 2,
            "labels": torch.zeros(2, 128, 128, dtype=torch.long),
            "upernet": SimpleNamespace(),
            "dpt": SimpleNamespace(),
            "dinov2": aptvit.adapt(Dinov2Model(config), keep=0.5),
        }
    elif page == "docs/demo.md":
        names["model"] = aptvit.adapt(timm.create_model("vit_base_patch16_384"), thresholds=(5.0,))
    elif page == "docs/export.md":
        names["pixels"] = images[:1].numpy()
    return names


def prepare(page: str) -> None:
    """What the commands of a page would have written before."""
    vit = timm.create_model("vit_base_patch16_384", num_classes=2)
    model = aptvit.adapt(vit, thresholds=(5.0,))
    if page == "README.md":
        Path("config.json").write_text(json.dumps({"aptvit": settings_of(model.patchifier)}))
    if page in ("README.md", "docs/training.md"):
        Path("healed/model").mkdir(parents=True)
        model.save_pretrained("healed/model")
    if page == "docs/training.md":
        Path("holiday").mkdir()
        for name, pixels in sample_photos().items():
            Image.fromarray(pixels).resize((128, 128)).save(f"holiday/{name}.png")
    if page == "docs/demo.md":
        Image.fromarray(sample_photos()["coffee"]).save("photo.jpg")
    if page == "docs/bulk.md":
        from pyarrow import parquet, table

        Path("features").mkdir()
        parquet.write_table(table({"file": ["a"], "feature": [[1.0]], "error": [None]}), "features/part-000000.parquet")
    if page == "docs/dense.md":
        detector = aptvit.dense.make_detector(model, num_classes=2, channels=16)
        Path("adaptive").mkdir()
        save_dense(
            Path("adaptive"),
            model,
            "detection",
            ("red", "blue"),
            {"num_classes": 2, "channels": 16},
            detector.state_dict(),
        )
    if page == "docs/export.md":
        from aptvit.export.graphs import export_onnx

        shallow = timm.create_model("vit_base_patch16_384", depth=1)
        export_onnx(aptvit.adapt(shallow, thresholds=(5.0,)), (128, 128), Path("exported"))


@pytest.mark.parametrize("page", pages_with("python"))
def test_python(page: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(page.relative_to(ROOT))
    prepare(name)
    names = given(name)
    for language, text in snippets(page):
        if language == "python":
            for large, little in SMALLER.items():
                text = text.replace(large, little)
            exec(compile(text, name, "exec"), names)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each line, without what starts several of them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.mark.parametrize("page", pages_with("bash", ""))
def test_commands(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    checked = 0
    for language, text in snippets(page):
        for words in commands(text) if language in ("bash", "") else ():
            if "aptvit" in words[:5] and words[0] != "pip":
                words = words[words.index("aptvit") + 1 :]
                command = root.get_command(None, words[0])
                assert command is not None, f"{page.name}: there is no `aptvit {words[0]}`"
                # Raises where an option does not exist or a value is none of its choices; nothing is run.
                command.make_context(words[0], list(words[1:]))
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            elif words[0].startswith("benchmarks/") or (words[:2] == ["python", words[1]] and words[1].endswith(".py")):
                assert (ROOT / words[words[0] == "python"]).is_file(), words
            else:
                assert words[0] in ("pip", "python", "git", "source", ".venv/bin/python", "cd"), words
            checked += 1
    assert checked


# Commands of training, timing and teaching, as far as a test can go.
_SHORT = {"workers": 0, "precision": "float32", "batch_size": 2, "epochs": 1, "eval_every": 0}
_DENSE = {**_SHORT, "size": 128, "channels": 16}
SET = {"heal": {**_SHORT, "epochs": 1000}, "finetune": _SHORT, "train-detector": _DENSE, "train-segmenter": _DENSE}
LESS = {"heal": ["--minutes", "0.05"], "benchmark": ["--models", MODEL, "--batch", "1", "--rounds", "1", "--fresh"]}
LESS |= {"compare": ["--rounds", "1"], "evaluate": ["--rounds", "1"]}
# They serve for ever, need many processes, or read what is elsewhere: tried in tests of their own.
ELSEWHERE = ("demo", "vqa")


def make_files() -> None:
    """The folders and files that the pages name."""
    pictures = [Image.fromarray(one).resize((200, 170)) for one in sample_photos().values()]
    for folder in ("holiday", "photos", "flowers/train/a", "flowers/train/b", "flowers/val/a", "flowers/val/b", "val"):
        Path(folder).mkdir(parents=True)
        for i, one in enumerate(pictures):
            one.save(Path(folder) / f"{i}.png")
    Path("val/labels.csv").write_text("file,class_index\n" + "".join(f"{i}.png,{i}\n" for i in range(len(pictures))))
    for name in ("cat.jpg", "photo.jpg"):
        pictures[2].save(name)
    pictures[0].save("street.mp4", "WEBP", save_all=True, append_images=pictures[1:4])
    shapes.boxes(Path("cells"), 4, 2)
    for folder in ("streets", "other"):
        shapes.masks(Path(folder), 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash", ""))
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda _, pretrained=False, **options: create(MODEL, **options))
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    make_files()
    aptvit.adapt(timm.create_model("vit_base_patch16_384"), thresholds=(5.0,)).save_pretrained("run/model")
    for language, text in snippets(page):
        for words in commands(text) if language in ("bash", "") else ():
            remote = any(word.startswith("s3://") for word in words)
            if words[0] != "aptvit" or words[1] in ELSEWHERE or remote:
                continue
            name, *rest = words[1:]
            rest += LESS.get(name, []) + [
                word for key, value in SET.get(name, {}).items() for word in ("--set", f"{key}={value}")
            ]
            result = CliRunner().invoke(app, [name, *rest], catch_exceptions=False)
            assert result.exit_code == 0, (words, result.output)
