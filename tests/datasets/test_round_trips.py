"""Random small datasets, written in each format by a library of the format, read back equal."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aptvit.datasets.boxes import BoxFiles
from aptvit.dense import find_boxes, find_masks
from aptvit.training import find_sources

NAMES = ["cat", "dog", "émeu", "a b"]
SPLITS = [("train", "val"), ("train", "test"), ("train", "valid")]
quick = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def scenes(draw: Any) -> list[dict[str, Any]]:
    """Images of random sizes with objects of random corners, classes and marks of crowds."""
    images = []
    for number in range(draw(st.integers(1, 4))):
        width, height = draw(st.integers(12, 40)), draw(st.integers(12, 40))
        objects = []
        for _ in range(draw(st.integers(0, 3))):
            left, top = draw(st.integers(0, width - 4)), draw(st.integers(0, height - 4))
            right, bottom = draw(st.integers(left + 2, width)), draw(st.integers(top + 2, height))
            label, crowd = draw(st.integers(0, len(NAMES) - 1)), draw(st.booleans())
            objects.append({"box": [left, top, right, bottom], "label": label, "crowd": crowd})
        images.append({"name": f"{number}.a b", "size": (width, height), "objects": objects})
    if not any(image["objects"] for image in images):
        images[0]["objects"] = [{"box": [1, 2, 9, 10], "label": 1, "crowd": False}]
    return images


def draw_images(folder: Path, scene: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in scene:
        Image.new("RGB", image["size"], "gray").save(folder / f"{image['name']}.png")


def assert_equal(files: BoxFiles, scene: list[dict[str, Any]]) -> None:
    """Boxes, classes and crowds are those of the scene, in any order of the images."""
    by_name = {path.stem: i for i, path in enumerate(files.paths)}
    assert by_name.keys() == {image["name"] for image in scene}
    for image in scene:
        objects = files.load_objects(by_name[image["name"]])
        assert objects.image.size == image["size"]
        expected = torch.tensor([entry["box"] for entry in image["objects"]], dtype=torch.float32).reshape(-1, 4)
        torch.testing.assert_close(objects.boxes, expected, atol=2e-3, rtol=0)
        names = [files.classes[label] for label in objects.labels]
        assert names == [NAMES[entry["label"]] for entry in image["objects"]]


@quick
@given(train=scenes(), val=scenes(), splits=st.sampled_from(SPLITS), seed=st.integers(0, 99))
def test_coco(train: list[Any], val: list[Any], splits: tuple[str, str], seed: int) -> None:
    """Boxes and masks are those of pycocotools' own reader; ids of categories differ between the splits."""
    from pycocotools import mask as coco_masks
    from pycocotools.coco import COCO

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place:
        root, libraries = Path(place), []
        (root / "annotations").mkdir()
        for split, scene in zip(splits, (train, val), strict=True):
            draw_images(root / f"{split}2017", scene)
            ids = [int(number) for number in rng.permutation(len(NAMES)) + 1]
            record: dict[str, Any] = {
                "images": [],
                "annotations": [],
                "categories": [{"id": number, "name": name} for number, name in zip(ids, NAMES, strict=True)],
            }
            for key, image in enumerate(scene):
                width, height = image["size"]
                entry = {"id": key, "file_name": f"{image['name']}.png", "width": width, "height": height}
                record["images"].append(entry)
                for target in image["objects"]:
                    left, top, right, bottom = target["box"]
                    inside = np.zeros((height, width), np.uint8, order="F")
                    inside[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.7
                    packed = coco_masks.encode(inside)
                    packed["counts"] = packed["counts"].decode()
                    polygon = [[left, top, right, top, right, bottom - 0.4, left + 0.3, bottom]]
                    annotation = {
                        "id": len(record["annotations"]) + 1,
                        "image_id": key,
                        "category_id": ids[target["label"]],
                        "bbox": [left, top, right - left, bottom - top],
                        "area": float(inside.sum()) + 0.5,
                        "iscrowd": int(target["crowd"]),
                        "segmentation": packed if target["crowd"] or rng.random() < 0.5 else polygon,
                    }
                    record["annotations"].append(annotation)
            file = root / "annotations" / f"instances_{split}2017.json"
            file.write_text(json.dumps(record), encoding="utf-8")
            libraries.append(COCO(file))
        for files, scene, library in zip(find_boxes(root), (train, val), libraries, strict=True):
            assert files is not None and files.classes == find_boxes(root)[0].classes
            assert_equal(files, scene)
            for index, path in enumerate(files.paths):
                (key,) = [key for key, entry in library.imgs.items() if entry["file_name"] == path.name]
                annotations = library.imgToAnns[key]
                objects = files.load_objects(index)
                assert objects.crowd.tolist() == [bool(entry["iscrowd"]) for entry in annotations]
                assert objects.areas.tolist() == pytest.approx([entry["area"] for entry in annotations])
                masks = files.masks(index, *objects.image.size, crowds=True) if files.outlines else []
                for mask, annotation in zip(masks, annotations if files.outlines else [], strict=True):
                    assert np.array_equal(mask.numpy(), library.annToMask(annotation))


def supervision() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import supervision as library
    return library


def as_detections(folder: Path, scene: list[dict[str, Any]]) -> Any:
    """The scene as a dataset of supervision."""
    library = supervision()
    annotations = {}
    for image in scene:
        boxes = np.array([entry["box"] for entry in image["objects"]], np.float32).reshape(-1, 4)
        labels = np.array([entry["label"] for entry in image["objects"]], int)
        annotations[str(folder / f"{image['name']}.png")] = library.Detections(xyxy=boxes, class_id=labels)
    return library.DetectionDataset(NAMES, list(annotations), annotations)


@quick
@given(train=scenes(), val=scenes(), splits=st.sampled_from(SPLITS))
def test_pascal_voc(train: list[Any], val: list[Any], splits: tuple[str, str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "VOCdevkit" / "VOC2012"
        lists = root / "ImageSets" / "Main"
        lists.mkdir(parents=True)
        for split, scene in zip(splits, (train, val), strict=True):
            for image in scene:
                image["name"] = f"{split} {image['name']}"
            draw_images(root / "JPEGImages", scene)
            as_detections(root / "JPEGImages", scene).as_pascal_voc(
                annotations_directory_path=str(root / "Annotations")
            )
            (lists / f"{split}.txt").write_text("\n".join(image["name"] for image in scene))
            (lists / f"cat_{split}.txt").write_text("nothing  1")
            (root / "ImageSets" / "Segmentation").mkdir(exist_ok=True)
            (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("nothing")
        for files, scene in zip(find_boxes(place), (train, val), strict=True):
            assert files is not None and files.problems == []
            assert_equal(files, scene)


@quick
@given(train=scenes(), val=scenes(), splits=st.sampled_from(SPLITS))
def test_yolo(train: list[Any], val: list[Any], splits: tuple[str, str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for split, scene in zip(splits, (train, val), strict=True):
            folder = root / "images" / split
            draw_images(folder, scene)
            as_detections(folder, scene).as_yolo(annotations_directory_path=str(root / "labels" / split))
        names = json.dumps(NAMES)
        (root / "data.yaml").write_text(
            f"path: /datasets/gone\ntrain: images/{splits[0]}\n{splits[1]}: images/{splits[1]}\nnames: {names}\n"
        )
        for files, scene in zip(find_boxes(root), (train, val), strict=True):
            assert files is not None and files.problems == [] and files.classes == NAMES
            assert_equal(files, scene)


@quick
@given(labels=st.lists(st.integers(-1, 3), min_size=1, max_size=8).filter(lambda numbers: max(numbers) >= 0))
def test_shards(labels: list[int]) -> None:
    import webdataset

    with tempfile.TemporaryDirectory() as place:
        for split in ("train", "val"):
            with webdataset.TarWriter(str(Path(place) / f"{split}-000.tar")) as writer:
                for number, label in enumerate(labels):
                    sample = {"__key__": f"set/{number:03d}", "png": Image.new("RGB", (9, 9), (number, 0, 0))}
                    writer.write(sample if label < 0 else {**sample, "cls": label})
        for source in find_sources(place):
            assert source is not None and source.num_classes == max(labels) + 1
            images = [source.load(number) for number in range(len(source))]
            assert [label for _, label in images] == labels == [source.label(i) for i in range(len(source))]
            assert [image.getpixel((0, 0)) for image, _ in images] == [(i, 0, 0) for i in range(len(labels))]


@quick
@given(labels=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=8), data=st.data())
def test_datasets_of_the_hub(labels: list[int | None], data: Any) -> None:
    import datasets

    datasets.disable_progress_bars()
    labels = [*labels, 2]
    order = data.draw(st.permutations(["cat", "dog", "bird"]))
    with tempfile.TemporaryDirectory() as place:
        parts = {}
        for split, names in (("train", ["cat", "dog", "bird"]), ("validation", order)):
            features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
            images = [Image.new("RGB", (9, 9), (number, 0, 0)) for number in range(len(labels))]
            parts[split] = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        datasets.DatasetDict(parts).save_to_disk(place)
        train, val = find_sources(f"hf:{place}")
        assert val is not None
        for source, names in ((train, ["cat", "dog", "bird"]), (val, order)):
            read = [source.load(number)[1] for number in range(len(source))]
            assert [None if label < 0 else source.classes[label] for label in read] == [
                None if label is None else names[label] for label in labels
            ]
        assert list(train.classes) == list(val.classes)


@quick
@given(counts=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), min_size=1))
def test_folders(counts: dict[str, int]) -> None:
    from torchvision.datasets import ImageFolder

    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "train"
        for name, number in counts.items():
            (root / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (8, 8)).save(root / name / f"{i}.JPG", "jpeg")
        source, _ = find_sources(place)
        expected = ImageFolder(root)
        assert list(source.classes) == expected.classes
        assert [(source.name(i), source.label(i)) for i in range(len(source))] == expected.samples


@quick
@given(
    kind=st.sampled_from(["uint8", "uint16", "int32", "palette", "rgb"]),
    shape=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    seed=st.integers(0, 99),
)
def test_masks(kind: str, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    most = {"uint8": 200, "palette": 200, "rgb": 200}.get(kind, 60_000)
    classes = rng.integers(0, most, shape)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for split in ("Training", "dev"):
            for name in ("images", "masks"):
                (root / split / name).mkdir(parents=True)
            Image.new("RGB", shape[::-1]).save(root / split / "images" / "a.png")
            if kind == "palette":
                mask = Image.fromarray(classes.astype(np.uint8), mode="P")
                mask.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
            elif kind == "rgb":
                mask = Image.fromarray(np.repeat(classes.astype(np.uint8)[..., None], 3, 2))
            else:
                mask = Image.fromarray(classes.astype(kind))
            mask.save(root / split / "masks" / ("a.tif" if kind == "int32" else "a.png"))
        for files in find_masks(root, most, ignore=()):
            assert files is not None and files.num_classes == most
            assert np.array_equal(files.load(0)[1].numpy(), classes)


def test_bytes_of_an_image_are_kept() -> None:
    """The image that `load` returns is that which Pillow decodes."""
    with tempfile.TemporaryDirectory() as place:
        pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        (Path(place) / "cat").mkdir()
        (Path(place) / "cat" / "a.png").write_bytes(content.getvalue())
        assert np.array_equal(np.asarray(find_sources(place)[0].load(0)[0]), pixels)
