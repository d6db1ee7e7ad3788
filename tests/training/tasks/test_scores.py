"""Average precision and mean intersection over union on made-up sets with every oddity, against other code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from aptvit.dense import find_boxes, find_masks
from aptvit.training.data import make_loader
from aptvit.training.tasks.datasets import BoxDataset, MaskDataset
from aptvit.training.tasks.detection import score_detector
from aptvit.training.tasks.segmentation import score_segmenter


@pytest.fixture(scope="module")
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


SIDE = 120


def crowded(root: Path, seed: int) -> Path:
    """A set of COCO with crowds, tiny boxes, boxes over the border, empty images and a class without boxes."""
    from pycocotools import mask as coco_masks

    rng = np.random.default_rng(seed)
    record: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    record["categories"] = [{"id": 3 * k + 1, "name": name} for k, name in enumerate(["a", "b", "c", "none"])]
    for image in range(12):
        name = f"{image:02d}.png"
        Image.new("RGB", (SIDE, SIDE)).save(root / name)
        record["images"].append({"id": 100 - image, "file_name": name, "width": SIDE, "height": SIDE})
        for _ in range(0 if image % 4 == 0 else int(rng.integers(1, 6))):
            left, top = rng.uniform(-4, SIDE - 20, 2)
            width, height = rng.uniform(0.6, 60, 2)
            inside = np.zeros((SIDE, SIDE), np.uint8, order="F")
            inside[max(int(top), 0) : int(top + height) + 1, max(int(left), 0) : int(left + width) + 1] = 1
            packed = coco_masks.encode(inside)
            packed["counts"] = packed["counts"].decode()
            annotation = {
                "id": len(record["annotations"]) + 1,
                "image_id": 100 - image,
                "category_id": int(rng.choice([1, 4, 7])),
                "bbox": [left, top, width, height],
                "area": float(width * height * rng.uniform(0.3, 1)),
                "iscrowd": int(rng.random() < 0.3),
                "segmentation": packed,
            }
            record["annotations"].append(annotation)
    (root / "boxes.json").write_text(json.dumps(record))
    return root / "boxes.json"


def detections(record: Any, seed: int) -> list[list[dict[str, Any]]]:
    """For each image, boxes near the true ones, some twice, some of another class, and some of nothing."""
    rng = np.random.default_rng(seed)
    by_image = []
    for entry in record["images"]:
        rows = []
        for truth in record["annotations"]:
            if truth["image_id"] == entry["id"]:
                for _ in range(int(rng.integers(0, 3))):
                    x, y, width, height = np.array(truth["bbox"]) + rng.normal(0, 3, 4)
                    category = truth["category_id"] if rng.random() < 0.8 else 4
                    rows.append({"bbox": [x, y, max(width, 1), max(height, 1)], "category_id": category})
        for _ in range(int(rng.integers(0, 3))):
            rows.append({"bbox": [*rng.uniform(0, 80, 2), *rng.uniform(5, 40, 2)], "category_id": 1})
        for row in rows:
            row |= {"score": float(rng.random()), "image_id": entry["id"]}
        by_image.append(rows)
    return by_image


class Outputs(torch.nn.Module):
    """A learner that returns prepared outputs."""

    def __init__(self, outputs: list[Any]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, *_: Any) -> Any:
        return next(self.outputs)


def fake_detector(masks: bool) -> Any:
    """What `score_detector` asks a detector for; images are not resized."""
    layout = SimpleNamespace(keep_ratio=1.0, seqlens=[1], read_ratio=1.0, grid_sizes=[(1, 1)], patch_size=16)

    class Transform:
        def __call__(self, images: list[Tensor], targets: Any = None) -> Any:
            sizes = [(image.shape[1], image.shape[2]) for image in images]
            return SimpleNamespace(tensors=torch.stack(images), image_sizes=sizes), targets

        def postprocess(self, outputs: Any, *_: Any) -> Any:
            return outputs

    backbone = SimpleNamespace(model=SimpleNamespace(layout=lambda _: layout))
    return SimpleNamespace(roi_heads=SimpleNamespace(has_mask=lambda: masks), backbone=backbone, transform=Transform())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_is_that_of_pycocotools(
    tmp_path: Path, accelerator: Any, monkeypatch: pytest.MonkeyPatch, seed: int, masks: bool
) -> None:
    from pycocotools import mask as coco_masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file = crowded(tmp_path, seed)
    record = json.loads(file.read_text())
    rows = detections(record, seed)
    number = {1: 0, 4: 1, 7: 2}
    outputs = []
    for image_rows in rows:
        boxes = torch.tensor([row["bbox"] for row in image_rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        filled = torch.zeros(len(boxes), 1, SIDE, SIDE)
        for mask, (left, top, right, bottom) in zip(filled, boxes.round().int().clamp(0, SIDE).tolist(), strict=True):
            mask[0, top:bottom, left:right] = 1
        for row, mask in zip(image_rows, filled, strict=True):
            row["segmentation"] = coco_masks.encode(np.asfortranarray(mask[0].numpy().astype(np.uint8)))
        labels = torch.tensor([number[row["category_id"]] + 1 for row in image_rows], dtype=torch.long)
        scores = torch.tensor([row["score"] for row in image_rows])
        outputs.append([{"boxes": boxes, "labels": labels, "scores": scores, "masks": filled}])
    files, _ = find_boxes(file)
    monkeypatch.setattr(
        "aptvit.training.tasks.detection.KeptTokens", lambda *_: SimpleNamespace(add=lambda *_: None, means={})
    )
    loader = make_loader(BoxDataset(files, masks=masks), [[i] for i in range(len(files))], 0)
    got = score_detector(Outputs(outputs), fake_detector(masks), loader, accelerator)

    truth = COCO(file)
    for kind, name in (("bbox", "map"), ("segm", "mask_map")) if masks else (("bbox", "map"),):
        found = [
            {
                key: row[key]
                for key in ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
            }
            for image in rows
            for row in image
        ]
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert got[name] == pytest.approx(evaluation.stats[0], abs=1e-6)
        if kind == "bbox":
            assert [got["map_50"], got["map_75"]] == pytest.approx(evaluation.stats[1:3].tolist(), abs=1e-6)
    without_crowds = [entry for entry in record["annotations"] if not entry["iscrowd"]]
    assert len(without_crowds) < len(record["annotations"]) and 0.02 < got["map"] < 0.98


@pytest.mark.parametrize("num_classes", [5, 300])
def test_intersection_over_union_is_that_of_numpy(tmp_path: Path, accelerator: Any, num_classes: int) -> None:
    """With ignored pixels, an image that cannot be read, and more than 255 classes."""
    rng = np.random.default_rng(0)
    truths, guesses = [], []
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for image in range(5):
        Image.new("RGB", (24, 20)).save(tmp_path / "images" / f"{image}.png")
        truth = rng.integers(0, num_classes, (20, 24))
        truth[:3] = 65535
        Image.fromarray(truth.astype(np.uint16)).save(tmp_path / "masks" / f"{image}.png")
        guess = np.where(rng.random(truth.shape) < 0.4, rng.integers(0, num_classes, truth.shape), truth) % num_classes
        guesses.append(guess)
        truths.append(truth)
    (tmp_path / "images" / "4.png").write_bytes(b"no image")
    files, _ = find_masks(tmp_path, num_classes=num_classes, ignore=(65535,))
    logits = [
        torch.nn.functional.one_hot(torch.from_numpy(guess), num_classes).permute(2, 0, 1)[None] * 9.0
        for guess in guesses
    ]
    layout = SimpleNamespace(keep_ratio=1.0, grid_sizes=[(1, 1)], patch_size=16)
    normalization = SimpleNamespace(normalised=lambda images: images.float())
    model = SimpleNamespace(layout=lambda _: layout, patchifier=SimpleNamespace(normalization=normalization))

    def predict(image: Tensor, mode: str, crop: int, run: Any) -> Tensor:
        value: Tensor = run(image[None])[0]
        return value

    network: Any = SimpleNamespace(
        backbone=SimpleNamespace(model=model),
        num_classes=num_classes,
        ignore_index=files.no_class,
        crops=lambda *_: [0],
        predict=predict,
    )
    loader = make_loader(MaskDataset(files), [[i] for i in range(len(files))], 0)
    whole = {"slide": False, "crop": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "aptvit.training.tasks.segmentation.KeptTokens", lambda *_: SimpleNamespace(add=lambda *_: None, means={})
        )
        got = score_segmenter(Outputs(logits), network, loader, accelerator, whole)
    truth, guess = np.concatenate(truths[:4])[..., :], np.concatenate(guesses[:4])
    counted = truth != 65535
    truth, guess = truth[counted], guess[counted]
    ious = []
    for number in range(num_classes):
        union = ((truth == number) | (guess == number)).sum()
        if union:
            ious.append(((truth == number) & (guess == number)).sum() / union)
    assert got["miou"] == pytest.approx(np.mean(ious), abs=1e-5)
    assert got["accuracy"] == pytest.approx((truth == guess).mean(), abs=1e-5)
