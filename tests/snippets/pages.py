"""The snippets of README and docs, and what they are run with: small models, small images, files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import aptvit
from aptvit.dense.saved import save as save_dense
from aptvit.files.sample_photos import sample_photos
from aptvit.models.checkpoints import settings_of

MODEL = "test_vit"  # timm's smallest: 160 pixels, patches of 16
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Models, images and times that a test can afford; the words of the page otherwise.
SMALLER = {
    "img_size=1536": "img_size=128",
    "image_size=1536": "image_size=128, out_channels=16, box_detections_per_img=20",
    "crop=512": "crop=128",
}
SMALLER |= {"window_size=32": "window_size=4", "window_size=16": "window_size=4", "gflops=30": "gflops=0.03"}
SMALLER |= {'load_host("vit_base_patch16_384")': 'load_host("vit_base_patch16_384", img_size=128)'}
SMALLER |= {"DepthPyramid(768)": "DepthPyramid(64)", "resize((384, 384))": "resize((128, 128))"}
SMALLER |= {
    "minutes=8": "minutes=0.02, batch_size=4, crop=1.0, auto_augment=''",
    "epochs=1": "epochs=1, batch_size=4, lr=1e-3, precision='float32', workers=0",
}


def snippets(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def pages_with(*languages: str) -> list[Any]:
    found = [page for page in PAGES if any(language in languages for language, _ in snippets(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


def small_vit(create: Callable[..., Any], name: str, pretrained: bool = False, **options: Any) -> Any:
    return create(name, **{"embed_dim": 64, "num_heads": 2, "img_size": 128, **options}).eval()


DINO = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}


def make_dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**DINO)).eval()


def make_depth_anything() -> Any:
    from models.around_hosts import make

    host = make("depth_anything", std=0.2).host
    host.head.conv3.weight.data.abs_()  # depths are not negative: with random weights many would be zero
    return host


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretrained models are small ones with random weights, and what is compiled is traced only."""
    transformers = pytest.importorskip("transformers")
    import tiny_llava
    from torch._dynamo.testing import CompileCounter

    create, compile = timm.create_model, torch.compile
    monkeypatch.setattr(timm, "create_model", lambda name, **options: small_vit(create, name, **options))
    monkeypatch.setattr("aptvit.hosts.pretrained._weights_at_hand", lambda *_: True)
    made = {
        "AutoModel": make_dinov2,
        "AutoModelForDepthEstimation": make_depth_anything,
        "AutoImageProcessor": lambda: transformers.BitImageProcessor(
            size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
        ),
        "AutoProcessor": tiny_llava.make_processor,
        "LlavaForConditionalGeneration": tiny_llava.make_llava,
    }
    for name, make in made.items():
        own = getattr(transformers, name).from_pretrained

        def load(source: Any, own: Any = own, make: Any = make, **options: Any) -> Any:
            return own(source, **options) if Path(source).is_dir() else make()

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", staticmethod(load))
    monkeypatch.setattr(
        torch, "compile", lambda what, **options: compile(what, **{"backend": CompileCounter(), **options})
    )
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def taken_for_granted(page: str) -> dict[str, Any]:
    """Names that a page does not make itself."""
    photos = [Image.fromarray(photo).resize((128, 128)) for photo in list(sample_photos().values())[:2]]
    images = torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in photos])
    names: dict[str, Any] = {"aptvit": aptvit, "timm": timm, "torch": torch, "images": images, "frames": images}
    names |= {
        "sample_images": images,
        "batches": [images],
        "prompts": ["USER : <image> what is this ? ASSISTANT :"] * 2,
        "vit": timm.create_model("vit_base_patch16_384"),
    }
    if page in ("docs/how-to/timm.md", "docs/how-to/batches.md", "docs/how-to/compare.md", "docs/how-to/clips.md"):
        names["model"] = aptvit.adapt(names["vit"], keep=0.6)
    elif page in ("docs/how-to/hugging-face.md", "docs/how-to/models-around-a-vit.md", "docs/how-to/llava.md"):
        names |= {"images": photos}
    elif page in ("docs/how-to/windows.md", "docs/how-to/dense-models.md", "docs/how-to/train-dense.md"):
        boxes, masks = torch.tensor([[10.0, 10, 50, 60]]), torch.zeros(1, 128, 128, dtype=torch.uint8)
        masks[:, 10:60, 10:50] = 1
        names |= {
            "images": [image.float() / 255 for image in images],
            "batch": images.float() / 255,
            "image": images[0].float() / 255,
            "targets": [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}] * 2,
            "labels": torch.randint(150, (2, 128, 128)),
            "upernet": SimpleNamespace(),
            "dpt": SimpleNamespace(),
            "dinov2": aptvit.adapt(make_dinov2(), keep=0.5),
        }
    elif page == "docs/how-to/finetune.md":
        names["model"] = aptvit.adapt(names["vit"], keep=0.6)
    elif page == "docs/how-to/demo.md":
        names["model"] = aptvit.adapt(timm.create_model("vit_base_patch16_384"), thresholds=(7.5,))
    elif page == "docs/how-to/export.md":
        names["pixels"] = images[:1].numpy()
    return names


def prepare(page: str) -> Any:
    """What the commands of a page would have written before. Returns the model in it, or the rows."""
    vit = timm.create_model("vit_base_patch16_384", num_classes=2)
    model = aptvit.adapt(vit, thresholds=(5.0,))
    if page == "docs/start/tutorial.md":
        model.thresholds = (7.5,)  # one photo of a cup
    if page in ("docs/start/tutorial.md", "docs/how-to/choose.md"):
        Path("config.json").write_text(json.dumps({"aptvit": settings_of(model.patchifier)}))
    if page == "docs/how-to/choose.md":
        model.save_pretrained("tuned")
    if page in ("docs/start/tutorial.md", "docs/how-to/demo.md"):
        Image.fromarray(sample_photos()["coffee"]).save("photo.jpg")
    if page == "docs/how-to/heal.md":
        Path("healed/model").mkdir(parents=True)
        model.save_pretrained("healed/model")
        Path("holiday").mkdir()
        for name, pixels in sample_photos().items():
            photo = Image.fromarray(pixels).resize((128, 128))
            for number in range(2):
                photo.rotate(180 * number).save(f"holiday/{name}{number}.png")
    if page == "docs/how-to/finetune.md":
        for name, turn in {"rose": 0, "tulip": 180}.items():
            for split in ("train", "val"):
                Path(f"flowers/{split}/{name}").mkdir(parents=True)
                for number, pixels in enumerate(sample_photos().values()):
                    photo = Image.fromarray(pixels).resize((128, 128)).rotate(turn)
                    photo.save(f"flowers/{split}/{name}/{number}.png")
    if page == "docs/how-to/bulk.md":
        import pyarrow
        from pyarrow import parquet

        rows = {"file": ["a", "b"], "feature": [[1.0, 2.0], None], "error": [None, "empty"]}
        types = {"file": pyarrow.string(), "feature": pyarrow.list_(pyarrow.float32()), "error": pyarrow.string()}
        Path("features").mkdir()
        for number in range(2):
            part = {name: pyarrow.array(rows[name][number : number + 1], kind) for name, kind in types.items()}
            parquet.write_table(pyarrow.table({**part, "width": [5]}), f"features/part-{number:06d}.parquet")
        return rows
    if page == "docs/how-to/train-dense.md":
        options = {"num_classes": 2, "out_channels": 16, "image_size": 128}
        detector = aptvit.dense.make_detector(model, **options)
        Path("adaptive").mkdir()
        save_dense(Path("adaptive"), model, "detection", ("red", "blue"), options, detector.state_dict())
        return detector.eval()
    if page == "docs/how-to/export.md":
        from aptvit.export.graphs import export_onnx

        model = aptvit.adapt(timm.create_model("vit_base_patch16_384", depth=1), thresholds=(6.5,))
        export_onnx(model, (128, 128), Path("exported"))
    return model
