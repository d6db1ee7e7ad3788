"""Where labels come from, and what is said when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from aptvit.datasets.labelled import LabelledImages, find_labelled, find_labels


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()  # finding is not opening


def table(folder: Path, *rows: str, header: str = "file,class_index") -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_folder_of_photos_has_no_labels(tmp_path: Path) -> None:
    files(tmp_path, "b.jpg", "a.png", "deep/c.jpg")
    result = find_labelled(tmp_path, 1000)
    assert [path.name for path in result.paths] == ["a.png", "b.jpg", "c.jpg"] and result.labels is None
    assert find_labelled(tmp_path / "b.jpg", 1000).paths == [tmp_path / "b.jpg"]


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_table_names_files_beside_it(tmp_path: Path, given: str) -> None:
    files(tmp_path, "a.jpg", "deep/b.jpg", "unlabelled.jpg")
    path = table(tmp_path, "deep/b.jpg,3,wnid", "a.jpg,0,wnid", "gone.jpg,1,wnid", header="file,class_index,wnid")
    result = find_labelled(tmp_path if given == "folder" else path, 10)
    assert result.paths == [tmp_path / "deep" / "b.jpg", tmp_path / "a.jpg"] and result.labels == [3, 0]
    assert len(result.skipped) == 1 and "gone.jpg" in result.skipped[0]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a.jpg,10"], "file,class_index", "line 2: class_index '10' .* from 0 to 9"),
        (["a.jpg,0", "a.jpg,1"], "file,class_index", "line 3: a.jpg has two classes"),
        (["a.jpg,tench"], "file,class_index", "class_index 'tench'"),
        (["a.jpg"], "file,class_index", "class_index None"),
        (["a.jpg,-1"], "file,class_index", "class_index '-1'"),
        (["a.jpg,1"], "name,class", "must have the columns file and class_index; it has name, class"),
        (["b.jpg,1"], "file,class_index", "names no file that is in .* such as b.jpg"),
        ([], "file,class_index", "no rows"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    files(tmp_path, "a.jpg")
    with pytest.raises(ValueError, match=message):
        find_labelled(table(tmp_path, *rows, header=header), 10)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"labels\.csv is not text in UTF-8"):
        find_labelled(tmp_path, 10)
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.csv"):
        find_labelled(tmp_path / "nowhere.csv", 10)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("3", "0", "12"), [0, 12, 3]),  # in the order of the folders' names
        (("003", "000"), [0, 3]),
        (("n01440764", "n01443537"), [0, 1]),
        (("tench", "Great_White-Shark"), [2, 0]),
    ],
)
def test_folders_named_after_classes_are_labels(tmp_path: Path, names: tuple[str, ...], labels: list[int]) -> None:
    files(tmp_path, *(f"{name}/photo.jpg" for name in names))
    assert find_labelled(tmp_path, 1000).labels == labels


def test_words_are_those_of_imagenet(tmp_path: Path) -> None:
    info = ImageNetInfo("imagenet-1k")
    for index in (7, 207, 999):
        files(tmp_path, f"{info.index_to_description(index).split(',')[0].replace(' ', '_')}/photo.jpg")
    assert sorted(find_labelled(tmp_path, 1000).labels or []) == [7, 207, 999]


def test_folders_named_after_no_class_are_only_folders(tmp_path: Path) -> None:
    files(tmp_path, "holiday/a.jpg", "2023/b.jpg")
    assert find_labelled(tmp_path, 1000).labels is None
    assert find_labelled(tmp_path, 7).labels is None  # no words are known for seven classes


def test_some_folders_named_after_classes_are_refused(tmp_path: Path) -> None:
    files(tmp_path, "tench/a.jpg", "holiday/b.jpg")
    with pytest.raises(ValueError, match=r"such as holiday: .*labels\.csv"):
        find_labelled(tmp_path, 1000)


def test_a_word_of_two_classes_is_no_label(tmp_path: Path) -> None:
    files(tmp_path, "crane/a.jpg")
    assert find_labelled(tmp_path, 1000).labels is None


@pytest.mark.parametrize("what", ["empty", "nowhere"])
def test_no_photos_are_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images found|does not exist"):
        find_labelled(tmp_path / what, 10)


def test_a_part_is_spread_over_the_whole() -> None:
    photos = LabelledImages([Path(f"{i}.jpg") for i in range(100)], list(range(100)), "made up")
    few = photos.spread(5)
    assert few.labels == [0, 25, 50, 74, 99] and [path.stem for path in few.paths] == ["0", "25", "50", "74", "99"]
    assert photos.spread(None) is photos and photos.spread(100) is photos
    assert LabelledImages(photos.paths, None, "none").spread(3).labels is None
    with pytest.raises(ValueError, match="0 images"):
        photos.spread(0)


def test_the_images_of_all_splits_have_labels(tmp_path: Path) -> None:
    files(tmp_path, "train/0/a.jpg", "train/1/b.jpg", "val/1/c.jpg", "val/0/d.jpg")
    names = {"train/0/a.jpg": 0, "train/1/b.jpg": 1, "val/1/c.jpg": 1, "val/0/d.jpg": 0}
    assert find_labels(tmp_path, 2) == {tmp_path / name: label for name, label in names.items()}
    assert find_labels(tmp_path / "val", 2) == {tmp_path / name: names[name] for name in ("val/0/d.jpg", "val/1/c.jpg")}
    table(tmp_path, "train/0/a.jpg,1")
    assert find_labels(tmp_path, 2) == {tmp_path / "train/0/a.jpg": 1}  # a table comes before names of folders
