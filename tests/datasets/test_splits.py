"""Names of splits count as whole words, and what is ambiguous is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from aptvit.datasets.splits import arrange, describe, split_of
from aptvit.training import find_sources


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("TRAIN", "train"),
        ("Training", "train"),
        ("train2017", "train"),
        ("instances_train2017", "train"),
        ("train-00000-of-00008", "train"),
        ("trainA", "train"),
        ("my.train.set", "train"),
        ("val", "val"),
        ("Validation", "val"),
        ("valid", "val"),
        ("dev", "val"),
        ("imagenet_val", "val"),
        ("image_info_test2017", "test"),
        ("testing", "test"),
        ("trainval", "trainval"),
        ("train_val", "trainval"),
        ("strainer", None),
        ("constraint", None),
        ("trains", None),
        ("traindata", None),
        ("evaluation_of_devices", None),
        ("VOCdevkit", None),
        ("invalid", None),
        ("latest", None),
        ("contest", None),
        ("images", None),
    ],
)
def test_words_count_as_a_whole(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_a_name_of_two_splits_is_refused() -> None:
    with pytest.raises(ValueError, match="names test and train"):
        split_of("train_test")


def names(*words: str) -> dict[str, str]:
    return {word: word for word in words}


def test_parts_are_arranged() -> None:
    assert arrange(names("a", "b"), "data").train == ["a", "b"]
    splits = arrange(names("train", "val", "test", "extra"), "data")
    assert (splits.train, splits.evaluation) == (["train"], ["val"])
    assert splits.left_out == ("data: test is not used", "data: extra is not used")
    assert arrange(names("training", "test"), "data").evaluation == ["test"]
    assert arrange(names("train", "train_small", "dev"), "data").train == ["train"]  # the whole name comes first
    assert arrange(names("trainval", "test"), "data").evaluation == ["test"]
    assert arrange(names("trainval", "val"), "data").evaluation is None  # its images are trained on
    shards = arrange(names("train-0", "train-1", "val-0"), "data", several=True)
    assert (shards.train, shards.evaluation) == (["train-0", "train-1"], ["val-0"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["val", "cats"], "no training split"),
        (["train", "bus", "car"], "beside bus, which is no split"),
        (["train", "val", "validation"], "val and validation for the same split"),
        (["train_a", "train_b", "val"], "train_a and train_b for the same split"),
    ],
)
def test_ambiguous_parts_are_refused(parts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        arrange(names(*parts), "data")
    assert "--train and --val" in str(caught.value)


def fill(root: Path, *folders: str, number: int = 1) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (8, 8)).save(root / folder / f"{folder.replace('/', '-')}-{i}.png")
    return root


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("val", ["val", "Validation", "valid", "dev", "test", "Testing"])
@pytest.mark.parametrize("wrapper", ["", "flowers/flowers/"])
def test_folders_of_splits(tmp_path: Path, train: str, val: str, wrapper: str) -> None:
    fill(tmp_path, *(f"{wrapper}{split}/{name}" for split in (train, val) for name in ("cat", "dog")))
    images, evaluation = find_sources(tmp_path)
    assert evaluation is not None and (len(images), len(evaluation)) == (2, 2)
    place = str(tmp_path / wrapper)
    assert describe(images, evaluation) == (
        f"train: 2 images from {Path(place) / train}, validation: 2 images from {Path(place) / val}, 2 classes"
    )


def test_a_class_of_trains_is_no_split(tmp_path: Path) -> None:
    fill(tmp_path, "bus", "car", "train")
    with pytest.raises(ValueError, match="which is no split"):
        find_sources(tmp_path)
    images, evaluation = find_sources(None, train=str(tmp_path))
    assert (list(images.classes), evaluation) == (["bus", "car", "train"], None)


def test_named_splits(tmp_path: Path) -> None:
    fill(tmp_path, "a/cat", "a/dog", "b/dog", "c/bird")
    images, evaluation = find_sources(tmp_path, train="a", val=str(tmp_path / "b"))
    assert evaluation is not None and [evaluation.label(0), list(evaluation.classes)] == [1, ["cat", "dog"]]
    assert len(images) == 2
    with pytest.raises(ValueError, match="the class 'bird', which the training split does not have"):
        find_sources(tmp_path, train="a", val="c")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_sources(tmp_path, train="nowhere")


def test_splits_inside_classes(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{name}/{split}" for name in ("cat", "dog") for split in ("train", "val")))
    images, evaluation = find_sources(tmp_path)
    assert evaluation is not None
    assert sorted(Path(images.name(i)).name for i in range(2)) == ["cat-train-0.png", "dog-train-0.png"]
    assert [evaluation.label(i) for i in range(2)] == [0, 1]


def test_what_belongs_to_no_class_is_told(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat", "train/dog", "val/cat", "test/cat", "other/cat")
    (tmp_path / "train" / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "loose.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "readme.png")
    images, evaluation = find_sources(tmp_path)
    assert evaluation is not None and (len(images), len(evaluation)) == (2, 1)
    told = " | ".join(images.problems)
    for words in ("test is not used", "other is not used", "readme.png", "loose.png", "empty holds no images"):
        assert words in told


def test_links_are_read_once_and_loops_end(tmp_path: Path) -> None:
    fill(tmp_path / "store", "cat", number=2)
    fill(tmp_path / "data", "dog", "__MACOSX")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "data" / "dog" / "loop").symlink_to(tmp_path / "data")
    images, _ = find_sources(tmp_path / "data")
    assert (list(images.classes), len(images)) == (["cat", "dog"], 3)
