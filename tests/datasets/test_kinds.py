"""Inputs that were once read wrongly without a word: each is read, listed or refused."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aptvit.bulk import list_images
from aptvit.bulk.listing import read_entries
from aptvit.datasets.labelled import find_labelled
from aptvit.dense import find_boxes
from aptvit.files.images import ImageError
from aptvit.training import find_sources


def image_bytes(kind: str = "jpeg") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, kind)
    return content.getvalue()


def shard(path: Path, *members: str | tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            is_image = isinstance(member, str) and member.lower().endswith(("jpg", "png"))
            name, content = (member, image_bytes() if is_image else b"1") if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


# Shards


@pytest.mark.parametrize(
    ("members", "samples", "told"),
    [
        (["a.jpg", "a.cls"], {"a.jpg": 1}, None),
        (["a.JPG", "a.CLS"], {"a.JPG": 1}, None),
        (["c.left.jpg", "c.cls"], {"c.left.jpg": 1}, None),
        (["c.left.jpg", "c.right.jpg", "c.cls"], {"c.left.jpg": 1}, r"c\.right\.jpg is a further image"),
        (["v 2.0.jpg", "v 2.0.cls", "v 2.1.jpg", ("v 2.1.cls", b"0")], {"v 2.0.jpg": 1, "v 2.1.jpg": 0}, None),
        (["a.jpg", "a.png", "a.cls"], {"a.jpg": 1}, r"a\.png is a further image"),
        (["a.png", "a.jpg", "a.cls"], {"a.jpg": 1}, r"a\.png is a further image"),
        (["a.seg.png", "a.jpg", "a.cls"], {"a.jpg": 1}, r"a\.seg\.png is a further image"),
        (["x/a.jpg", "x/a.cls", "y/a.jpg", ("y/a.cls", b"0")], {"x/a.jpg": 1, "y/a.jpg": 0}, None),
        (["a.jpg", "b.jpg", "a.cls", ("b.cls", b"0")], {"a.jpg": 1, "b.jpg": 0}, None),  # not beside each other
        (["a.jpg", ("a.json", b'{"label": 1, "x": 2}')], {"a.jpg": 1}, None),
        (["a.jpg", ("a.json", b"\xef\xbb\xbf" + b'{"label": 1}')], {"a.jpg": 1}, None),
        (["a.jpg", "a.cls", ("a.json", b'{"caption": "cat"}')], {"a.jpg": 1}, None),
        (["a.jpg", "a.cls", "b.jpg"], {"a.jpg": 1, "b.jpg": -1}, r"1 image has no label, such as .*b\.jpg"),
        (["a.jpg", "a.cls", "b.jpg", ("b.json", b'{"label": null}')], {"a.jpg": 1, "b.jpg": -1}, "1 image has no"),
        (["a.jpg", "a.cls", "a.txt", "._a.jpg"], {"a.jpg": 1}, r"1 members \.txt are not read"),
        (["a.jpg", "a.cls", "a.jpg"], {"a.jpg": 1}, "is there twice"),
        (["a.jpg", "a.cls", "b.jpg", "b.cls", "a.jpg", ("a.cls", b"0")], {"a.jpg": 1, "b.jpg": 1}, r"a\.cls is there"),
        (["a.jpg", "a.cls", "b.cls"], {"a.jpg": 1}, "1 label has no image, such as that of b"),
    ],
)
def test_members_of_samples(tmp_path: Path, members: Any, samples: dict[str, int], told: str | None) -> None:
    source, _ = find_sources(shard(tmp_path / "0.tar", *members))
    assert {source.name(i).split(":", 1)[1]: source.load(i)[1] for i in range(len(source))} == samples
    if told is None:
        assert not source.problems
    else:
        assert re.search(told, " | ".join(source.problems)), source.problems


def test_labels_of_shards_may_be_names(tmp_path: Path) -> None:
    cat, dog = ("a.cls", b"cat"), ("b.cls", b"dog")
    source, _ = find_sources(shard(tmp_path / "0.tar", "a.jpg", cat, "b.jpg", dog))
    assert (list(source.classes), [source.label(0), source.label(1)]) == (["cat", "dog"], [0, 1])
    with pytest.raises(ValueError, match="use one kind"):
        find_sources(shard(tmp_path / "1.tar", "a.jpg", cat, "b.jpg", "b.cls"))
    with pytest.raises(ValueError, match=r"a\.json is no label"):
        find_sources(shard(tmp_path / "2.tar", "a.jpg", ("a.json", b'{"label": 1.5}')))
    (tmp_path / "named" / "classes.txt").parent.mkdir()
    (tmp_path / "named" / "classes.txt").write_text("tea\nmilk\n")
    shard(tmp_path / "named" / "train-0.tar", "a.jpg", "a.cls")
    assert list(find_sources(tmp_path / "named")[0].classes) == ["tea", "milk"]
    shard(tmp_path / "named" / "val-0.tar", "a.jpg", ("a.cls", b"2"))
    with pytest.raises(ValueError, match="the label 2, which is none of the 2 classes"):
        find_sources(tmp_path / "named")


def test_splits_of_shards(tmp_path: Path) -> None:
    for name in ("train-000", "train-001", "val/000"):
        shard(tmp_path / f"{name}.tar", "a.jpg", "a.cls")
    train, val = find_sources(tmp_path)
    assert val is not None and (len(train), len(val)) == (2, 1)
    one, _ = find_sources(f"{tmp_path}/train-{{000..001}}.tar")
    assert len(one) == 2
    train, val = find_sources(None, train=f"{tmp_path}/train-*.tar", val=f"{tmp_path}/val/000.tar")
    assert val is not None and (len(train), len(val)) == (2, 1)
    for name in ("constraint", "strainer"):
        shard(tmp_path / "other" / f"{name}.tar", "a.jpg", "a.cls")
    train, val = find_sources(tmp_path / "other")
    assert val is None and len(train) == 2
    with pytest.raises(ValueError, match="no shards match"):
        find_sources(tmp_path / "nothing-*.tar")
    (tmp_path / "0.tgz").touch()
    with pytest.raises(ValueError, match="unpack it"):
        find_sources(tmp_path / "0.tgz")


def test_a_stray_archive_is_not_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.jpg").write_bytes(image_bytes())
    shard(tmp_path / "backup.tar", "b.jpg")
    with pytest.raises(ValueError, match=r"1 tar files, such as backup\.tar, beside images, such as a\.jpg"):
        find_sources(tmp_path)
    names = sorted(Path(entry.name).name for entry in list_images(str(tmp_path)))
    assert names == ["a.jpg", "backup.tar:b.jpg"]


# Datasets of the hub


def test_rows_without_an_image(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.new("RGB", (8, 8)), None], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    source, _ = find_sources(f"hf:{tmp_path}")
    with pytest.raises(ImageError, match="the row has no image"):
        source.load(1)


def test_columns_and_splits_of_the_hub(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 8))] * 2

    def write(name: str, columns: dict[str, Any], rows: dict[str, Any], splits: tuple[str, ...] = ("train",)) -> str:
        features = datasets.Features({"image": datasets.Image(), **columns})
        one = datasets.Dataset.from_dict({"image": images, **rows}, features=features)
        datasets.DatasetDict({split: one for split in splits}).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    fine = datasets.ClassLabel(names=["a", "b"])
    with pytest.raises(ValueError, match="several columns of labels, fine, coarse"):
        find_sources(write("two", {"fine": fine, "coarse": fine}, {"fine": [0, 1], "coarse": [1, 0]}))
    text = write("text", {"label": datasets.Value("string")}, {"label": ["dog", "cat"]})
    source, _ = find_sources(text)
    assert (list(source.classes), [source.label(0), source.label(1)]) == (["cat", "dog"], [1, 0])
    numbers = write("numbers", {"label": datasets.Value("int64")}, {"label": [2, -1]})
    assert [find_sources(numbers)[0].label(i) for i in range(2)] == [2, -1]
    splits = write("splits", {"label": fine}, {"label": [0, 1]}, ("first", "second"))
    with pytest.raises(ValueError, match="has the splits first, second: name them"):
        find_sources(splits)
    train, val = find_sources(splits, train="second", val="first")
    assert val is not None and (train.origin.split()[0], val.origin.split()[0]) == ("second", "first")
    with pytest.raises(ValueError, match="has no split third"):
        find_sources(splits, train="third")
    with pytest.raises(ValueError, match="no image has a label"):
        find_sources(write("none", {"label": fine}, {"label": [None, None]}))


# Boxes


def coco(root: Path, name: str, record: dict[str, Any]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\ufeff" + json.dumps(record), encoding="utf-8")


def record_of(file_name: str, categories: list[tuple[int, str]], category: int, **extra: Any) -> dict[str, Any]:
    annotation = {"id": 1, "image_id": 1, "category_id": category, "bbox": [1, 1, 9, 9], **extra}
    return {
        "images": [{"id": 1, "file_name": file_name}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [annotation],
    }


def save(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), colour).save(path)


@pytest.mark.parametrize("under", ["", "images/"])
@pytest.mark.parametrize("splits", [("train", "val"), ("Train2017", "Validation2017"), ("training", "test")])
def test_images_of_the_same_names(tmp_path: Path, under: str, splits: tuple[str, str]) -> None:
    for split, colour in zip(splits, ("red", "blue"), strict=True):
        save(tmp_path / under / split / "1.png", colour)
        coco(tmp_path, f"annotations/instances_{split}.json", record_of("1.png", [(1, "x")], 1))
    train, val = find_boxes(tmp_path)
    assert val is not None and [path.parent.name for files in (train, val) for path in files.paths] == list(splits)
    (tmp_path / f"annotations/instances_{splits[1]}.json").unlink()
    (tmp_path / f"annotations/instances_{splits[0]}.json").rename(tmp_path / "all.json")
    with pytest.raises(ValueError, match=r"all\.json: 1\.png may be"):
        find_boxes(tmp_path)


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "1.png")
    coco(tmp_path, "train.json", record_of("train/1.png", [(1, "cat"), (2, "dog")], 2))
    for categories in ([(2, "dog")], [(1, "dog"), (7, "cat")], [(5, "dog"), (6, "unused")]):
        coco(tmp_path, "val.json", record_of("val/1.png", categories, categories[0][0]))
        train, val = find_boxes(tmp_path)
        assert val is not None and train.classes[int(val.load(0)[2])] == "dog" and val.classes == ["cat", "dog"]
    coco(tmp_path, "val.json", record_of("val/1.png", [(1, "bird")], 1))
    with pytest.raises(ValueError, match=r"val\.json has the class 'bird', which the training split does not have"):
        find_boxes(tmp_path)


def test_annotations_as_downloaded(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        save(tmp_path / split / f"{split}.png")
        coco(tmp_path, f"annotations/instances_{split}.json", record_of(f"{split}.png", [(1, "x")], 1))
        for other in ("captions", "person_keypoints"):
            coco(tmp_path, f"annotations/{other}_{split}.json", {})
    coco(tmp_path, "annotations/image_info_test2017.json", {"images": [{"id": 9, "file_name": "t.png"}]})
    train, val = find_boxes(tmp_path)
    assert val is not None and [path.stem for path in (*train.paths, *val.paths)] == ["train2017", "val2017"]
    assert any("image_info_test2017.json" in problem for problem in train.problems)
    coco(tmp_path, "annotations/instances_train_small.json", record_of("train2017.png", [(1, "x")], 1))
    with pytest.raises(ValueError, match="for the same split"):
        find_boxes(tmp_path)
    small = tmp_path / "annotations" / "instances_train_small.json"
    train, val = find_boxes(tmp_path, train=str(small), val="annotations/instances_val2017.json")
    assert val is not None and train.origin == str(small)


def test_several_formats_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png")
    coco(tmp_path, "boxes.json", record_of("images/1.png", [(1, "x")], 1))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("x\n")
    with pytest.raises(ValueError, match="annotations of COCO and of YOLO"):
        find_boxes(tmp_path)
    assert len(find_boxes(tmp_path / "boxes.json")[0]) == 1
    (tmp_path / "boxes.json").unlink()
    files, _ = find_boxes(tmp_path)
    assert files.load(0)[1].tolist() == [[8, 6, 24, 18]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5", "at least 5"),
        ("7 0.5 0.5 0.1 0.1", "class 7, and there are 2 names"),
        ("0 10 12 20 20", "shares of the sides"),
        ("0 nan 0.5 0.1 0.1", "finite"),
        ("cat 0.5 0.5 0.1 0.1", "class id"),
    ],
)
def test_wrong_labels_of_yolo_leave_the_image_out(tmp_path: Path, line: str, reason: str) -> None:
    for name, label in (("a", "1 0.5 0.5 0.5 0.5"), ("b", line), ("c", None), ("d", "")):
        save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "labels").mkdir(exist_ok=True)
        if label is not None:
            (tmp_path / "labels" / f"{name}.txt").write_text(label)
    (tmp_path / "data.yaml").write_text("train: ../images\nnames: {0: cat, 1: dog}\n")
    files, _ = find_boxes(tmp_path)
    assert [path.stem for path in files.paths] == ["a", "c", "d"]
    told = " | ".join(files.problems)
    assert "b.txt: line 1" in told and reason in told and "1 images have no file of labels" in told


def test_polygons_and_poses_of_yolo(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    files, _ = find_boxes(tmp_path)
    assert files.load(0)[1].tolist() == [[8, 6, 24, 18]]
    mask = files.masks(0, 32, 24)[0].numpy()
    assert mask.sum() == 16 * 12 and mask[6:18, 8:24].all()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 1\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\nkpt_shape: [2, 3]\n")
    files, _ = find_boxes(tmp_path)
    assert files.load(0)[1].tolist() == [[8, 6, 24, 18]]


def test_folders_of_splits_with_pascal_voc(tmp_path: Path) -> None:
    for split, name in (("train", "dog"), ("valid", "cat")):
        save(tmp_path / split / "1.png")
        box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        objects = "".join(f"<object><name>{word}</name>{box}</object>" for word in {name, "dog"})
        (tmp_path / split / "1.xml").write_bytes(f"\ufeff<annotation>{objects}</annotation>".encode())
        save(tmp_path / split / "lonely.png")
    with pytest.raises(ValueError, match="valid has the class 'cat', which the training split does not have"):
        find_boxes(tmp_path)
    files, _ = find_boxes(tmp_path, train="train")
    assert "1 images have no annotation, such as lonely" in files.problems
    (tmp_path / "train" / "1.xml").write_text("<annotation><object><name>x</name></object></annotation>")
    with pytest.raises(ValueError, match=r"1\.xml is no annotation in Pascal VOC's form"):
        find_boxes(tmp_path)


# Names and text


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    for name in (b"a::b.jpg", b"\xff.jpg", b"tab\t.jpg"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(image_bytes())
    source, _ = find_sources(tmp_path)
    assert list(source.classes) == [r"caf\xe9"] and len(source) == 3
    assert all(source.load(i)[0].size == (16, 16) and source.name(i).encode() for i in range(3))
    entries = list_images(str(tmp_path))
    assert [isinstance(content, bytes) for content in read_entries(entries)] == [True] * 3
    assert all(entry.name.encode("utf-8") for entry in entries)


def test_text_in_other_encodings(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    rows = "file,class_index\na.png,1\nb.png,0\n"
    for content in (rows.encode("utf-8-sig"), rows.encode("utf-16")):
        (tmp_path / "labels.csv").write_bytes(content)
        assert find_labelled(tmp_path, 10).labels == [1, 0]
    (tmp_path / "labels.csv").write_bytes("file,class_index\ncaf\xe9.png,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        find_labelled(tmp_path, 10)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + f"{tmp_path / 'a.png'}\n".encode())
    assert [entry.file for entry in list_images(str(tmp_path / "list.txt"))] == [str(tmp_path / "a.png")]


def test_a_damaged_shard_is_a_row_of_its_own(tmp_path: Path) -> None:
    shard(tmp_path / "good.tar", "a.jpg")
    whole = shard(tmp_path / "cut.tar", "b.jpg", "c.jpg").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 + 1024 + 700])
    os.mkfifo(tmp_path / "pipe.jpg")
    entries = list_images(str(tmp_path))
    contents = dict(zip([Path(entry.name).name for entry in entries], read_entries(entries), strict=True))
    assert isinstance(contents["good.tar:a.jpg"], bytes) and isinstance(contents["pipe.jpg"], OSError)
    assert any(isinstance(content, Exception) for name, content in contents.items() if name.startswith("cut.tar"))


def test_a_shard_that_was_cut_between_members_is_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", "a.jpg", "b.jpg")
    with tarfile.open(path) as tar:
        start = tar.getmembers()[1].offset
    path.write_bytes(path.read_bytes()[:start])
    entries = list_images(str(tmp_path))
    assert [bool(entry.problem) for entry in entries] == [False, True] and "it was cut" in entries[1].problem
    with pytest.raises(ValueError, match=r"a\.tar is no shard of images and labels: it was cut"):
        find_sources(tmp_path)


def test_evaluation_takes_the_validation_split(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("val", 2)):
        for name in ("tench", "goldfish"):
            for i in range(number):
                save(tmp_path / split / name / f"{i}.png")
    images = find_labelled(tmp_path, 1000)
    assert (len(images.paths), sorted(set(images.labels or []))) == (4, [0, 1])
    own = find_labelled(tmp_path, 2, ["goldfish", "tench"])
    assert [
        path.parent.name == ["goldfish", "tench"][label]
        for path, label in zip(own.paths, own.labels or [], strict=True)
    ] == [True] * 4
    save(tmp_path / "validation" / "tench" / "0.png")
    with pytest.raises(ValueError, match="name the folder of the split to evaluate on"):
        find_labelled(tmp_path, 1000)


@pytest.mark.parametrize(
    ("file_name", "image"),
    [
        ("C:\\data\\pets\\images\\a.jpg", "images/a.jpg"),
        ("images\\a.jpg", "images/a.jpg"),
        ("/home/me/pets/images/a.jpg", "images/a.jpg"),
        ("/home/me/a.jpg", "data/a.jpg"),
    ],
)
def test_paths_of_another_machine_in_coco(tmp_path: Path, file_name: str, image: str) -> None:
    save(tmp_path / image)
    coco(tmp_path, "annotations.json", record_of(file_name, [(1, "dog")], 1))
    train, _ = find_boxes(tmp_path)
    assert train.paths == [tmp_path / image] and len(train.boxes[0]) == 1


def test_images_in_a_folder_beside_the_json_file_of_a_split(tmp_path: Path) -> None:
    for split, colour in (("train", "red"), ("val", "blue")):
        save(tmp_path / split / "images" / "a.jpg", colour)
        coco(tmp_path, f"{split}/labels.json", record_of("a.jpg", [(1, "dog")], 1))
    train, evaluation = find_boxes(tmp_path)
    assert evaluation is not None
    assert [files.paths[0].parent.parent.name for files in (train, evaluation)] == ["train", "val"]


def test_one_wrong_annotation_costs_itself_only(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.jpg")
    record = record_of("a.jpg", [(1, "dog")], 1)
    good = record["annotations"][0]
    record["annotations"] += [{**good, "id": 2, "bbox": [1, 2, 3]}, {**good, "id": 3, "category_id": 9}]
    coco(tmp_path, "annotations.json", record)
    train, _ = find_boxes(tmp_path)
    assert len(train.boxes[0]) == 1
    assert train.problems == [
        "a.jpg: annotation 2 has no box of four numbers",
        "a.jpg: annotation 3 has the category 9, which is not listed",
    ]
    record["annotations"] = record["annotations"][1:]
    coco(tmp_path, "annotations.json", record)
    with pytest.raises(ValueError, match=r"no boxes to train on: a\.jpg: annotation 2 has no box of four numbers"):
        find_boxes(tmp_path)


def test_a_broken_file_of_pascal_voc_costs_its_image_only(tmp_path: Path) -> None:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    texts = {"a": f"<annotation><object><name>dog</name>{box}</object></annotation>", "b": "<annotation><object>"}
    for stem, text in texts.items():
        save(tmp_path / "JPEGImages" / f"{stem}.jpg")
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(text)
    train, _ = find_boxes(tmp_path)
    assert [path.name for path in train.paths] == ["a.jpg"]
    assert "b.xml is no annotation in Pascal VOC's form" in train.problems[0]
