from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aptvit.files.images import ImageError
from aptvit.training import find_sources, hold_back, photos


def shard(path: Path, labels: list[int], ending: str = "cls") -> Path:
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            picture = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), 10 * i, dtype=np.uint8)).save(picture, "png")
            text = str(label) if ending == "cls" else f'{{"label": {label}}}'
            for name, content in ((f"{i:03d}.png", picture.getvalue()), (f"{i:03d}.{ending}", text.encode())):
                member = tarfile.TarInfo(f"set/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_folders_of_classes(folder: Path) -> None:
    train, evaluation = find_sources(folder)
    assert evaluation is not None and len(train) == 20 and len(evaluation) == 6 and train.num_classes == 2
    picture, label = train.load(len(train) - 1)
    assert picture.size == (170, 160) and label == 1 and "cup" in train.name(len(train) - 1)
    train, nothing = find_sources(folder / "train")
    assert nothing is None and len(train) == 20


def test_photos_need_no_classes(folder: Path) -> None:
    source = photos([folder])
    assert len(source) == 26 and source.num_classes == 0 and source.load(0)[1] == -1
    train, evaluation = find_sources(folder / "train" / "cat", labelled=False)
    assert len(train) == 10 and evaluation is None
    with pytest.raises(ValueError, match="has no classes"):
        find_sources(folder / "train" / "cat")


def test_classes_of_both_parts_must_be_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "cat").rename(tmp_path / "data" / "val" / "dog")
    with pytest.raises(ValueError, match="has the class 'dog'"):
        find_sources(tmp_path / "data")


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_tar_shards_are_read_in_any_order(tmp_path: Path, ending: str) -> None:
    shard(tmp_path / "train-0.tar", [0, 1, 2], ending)
    shard(tmp_path / "train-1.tar", [2, 0], ending)
    shard(tmp_path / "val-0.tar", [1], ending)
    train, evaluation = find_sources(tmp_path)
    assert evaluation is not None and (len(train), len(evaluation), train.num_classes) == (5, 1, 3)
    for number, (label, gray) in reversed(list(enumerate([(0, 0), (1, 10), (2, 20), (2, 0), (0, 10)]))):
        picture, got = train.load(number)
        assert got == label and np.asarray(picture)[0, 0, 0] == gray
    assert train.name(3) == f"{tmp_path}/train-1.tar:set/000.png"
    some, nothing = find_sources(tmp_path / "train-*.tar")
    assert len(some) == 5 and nothing is None


def test_a_dataset_on_disk(tmp_path: Path, folder: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    files = [str(file) for file in sorted((folder / "train").rglob("*.png"))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "cup"])})
    rows = datasets.Dataset.from_dict({"image": files, "label": [int("cup" in file) for file in files]}, features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "set")
    train, evaluation = find_sources(f"hf:{tmp_path / 'set'}")
    assert evaluation is not None and (len(train), len(evaluation), train.num_classes) == (20, 3, 2)
    picture, label = train.load(15)
    assert label == 1 and picture.mode == "RGB" and picture.size == (170, 160)
    with pytest.raises(ValueError, match="cannot load the dataset"):
        find_sources(f"hf:{tmp_path / 'nothing'}")


def test_a_part_is_held_back_and_spread(folder: Path) -> None:
    source, _ = find_sources(folder / "train")
    train, aside = hold_back(source, 0.2)
    assert aside is not None and (len(train), len(aside)) == (16, 4)
    names = {part.name(i) for part in (train, aside) for i in range(len(part))}
    assert len(names) == 20 and {aside.load(i)[1] for i in range(4)} == {0, 1}
    assert hold_back(source, 0.0) == (source, None)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        find_sources(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no shards match"):
        find_sources(tmp_path / "a-*.tar")
    (tmp_path / "broken.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(ValueError, match=r"broken\.tar is no shard"):
        find_sources(tmp_path)
    shard(tmp_path / "broken.tar", [0])
    source, _ = find_sources(tmp_path)
    content = bytearray((tmp_path / "broken.tar").read_bytes())
    content[512:560] = b"x" * 48  # the head of the first picture
    (tmp_path / "broken.tar").write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.tar:set/000\.png"):
        source.load(0)
