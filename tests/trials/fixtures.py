"""Good images, small models and trainings, which hostile files are put among."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .hostile.images import pixels

__all__ = ["MODEL", "NUM_GOOD", "SIZE", "class_folders", "coco", "good_images", "make_models", "masks", "voc", "yolo"]

MODEL = "test_vit"  # timm's smallest
SIZE = 64
NUM_GOOD = 3
CLASSES = ("cat", "dog")


def good_images(folder: Path, number: int = NUM_GOOD) -> Path:
    """``good0.png``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        Image.fromarray(pixels(i)).save(folder / f"good{i}.png")
    return folder


def class_folders(folder: Path) -> Path:
    """A folder for each class."""
    for name in CLASSES:
        good_images(folder / name, 2)
    return folder


def masks(folder: Path) -> Path:
    """``images`` and ``masks``, of two classes."""
    good_images(folder / "images")
    (folder / "masks").mkdir()
    for i in range(NUM_GOOD):
        values = np.zeros(pixels(i).shape[:2], np.uint8)
        values[:, 20:] = 1
        Image.fromarray(values).save(folder / "masks" / f"good{i}.png")
    return folder


def voc(folder: Path, names: tuple[str, ...] = ()) -> Path:
    """Pascal VOC's form, with annotations for further images of these names."""
    good_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    for name in (*(f"good{i}" for i in range(NUM_GOOD)), *names):
        text = f"<annotation><object><name>cat</name>{box}</object></annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)
    return folder


def coco_record() -> dict[str, Any]:
    """The content of a JSON file of COCO."""
    images = [{"id": i, "file_name": f"good{i}.png", "width": 60, "height": 44} for i in range(NUM_GOOD)]
    outline = [[5.0, 5.0, 40.0, 5.0, 40.0, 40.0]]
    objects = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 35, 35], "area": 600, "segmentation": outline}
        for i in range(NUM_GOOD)
    ]
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}


def coco(folder: Path) -> Path:
    """COCO's form, with the JSON file ``hostile.json``, which is good so far."""
    good_images(folder)
    (folder / "hostile.json").write_text(json.dumps(coco_record()))
    return folder


def yolo(folder: Path) -> Path:
    """YOLO's form, with ``hostile.yaml`` and a file of labels ``hostile.txt``, which are good so far."""
    good_images(folder / "images")
    shutil.copy(folder / "images" / "good0.png", folder / "images" / "hostile.png")
    (folder / "labels").mkdir()
    for name in (*(f"good{i}" for i in range(NUM_GOOD)), "hostile"):
        (folder / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (folder / "hostile.yaml").write_text("path: .\ntrain: images\nnames: [cat, dog]\n")
    return folder


def make_depth_model(folder: Path) -> None:
    """A model of transformers around a ViT, adaptive, with its processor."""
    import transformers

    import aptvit

    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 8}
    layers = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(
            **layers, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
        ),
        **{**sizes, "reassemble_hidden_size": 32, "patch_size": 14},
    )
    host = transformers.DepthAnythingForDepthEstimation(config).eval()
    aptvit.adapt(host, keep=0.5).save_pretrained(folder)
    transformers.DPTImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)


def make_models(folder: Path) -> None:
    """``model``, ``depth``, ``detector``, ``segmenter`` and ``weights.safetensors`` in a folder."""
    import timm
    import torch
    from safetensors.torch import save_file

    import aptvit
    from aptvit.dense.detector import make_detector
    from aptvit.dense.saved import save
    from aptvit.dense.segmenter import make_segmenter
    from aptvit.training import DetectionRecipe, SegmentationRecipe

    torch.manual_seed(0)
    host = timm.create_model(MODEL, num_classes=2, img_size=SIZE).eval()
    aptvit.adapt(host, keep=0.5).save_pretrained(folder / "model")
    make_depth_model(folder / "depth")
    host = timm.create_model(MODEL, num_classes=10).eval()
    save_file(host.state_dict(), folder / "weights.safetensors")
    host.reset_classifier(0)  # as trainings of detectors and segmenters do
    tasks: dict[str, tuple[Any, str, tuple[str, ...], dict[str, Any], Any]] = {
        "detector": (make_detector, "detection", ("cat",), {"out_channels": 16, "image_size": SIZE}, DetectionRecipe),
        "segmenter": (
            make_segmenter,
            "segmentation",
            CLASSES,
            {"channels": 16, "auxiliary_channels": 8},
            SegmentationRecipe,
        ),
    }
    for name, (maker, task, classes, options, recipe) in tasks.items():
        model, options = aptvit.adapt(host, keep=0.5), {"num_classes": len(classes), **options}
        network = maker(model, **options)
        (folder / name / "model").mkdir(parents=True)
        inference = {"slide": False, "crop": SIZE, "longer_side": SIZE, "shrink": 1.0} if name == "segmenter" else {}
        save(folder / name / "model", model, task, classes, options, network.state_dict(), inference)
        (folder / name / "recipe.yaml").write_text(recipe().to_yaml())
