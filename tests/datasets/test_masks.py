"""Masks of every kind: layouts, names, colours, palettes, and values that mean nothing by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Cityscapes

from aptvit.datasets.mask_values import colour_table
from aptvit.dense import find_masks
from aptvit.files.images import ImageError
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.tasks.datasets import MaskDataset

CLASSES = np.array([[0, 1, 2, 0], [2, 2, 1, 1]])


def pair(root: Path, image: str, mask: str, values: Any = CLASSES, **options: Any) -> None:
    pixels = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values, np.uint8))
    for name, picture in ((image, Image.new("RGB", pixels.size)), (mask, pixels)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name, **(options if name == mask else {}))


LAYOUTS = [
    ("images/{}/a.jpg", "annotations/{}/a.png"),
    ("Images/{}/a.jpg", "Labels/{}/a.png"),
    ("{}/a.jpg", "{}annot/a.png"),
    ("{}/a.jpg", "{}_masks/a.png"),
    ("{}/images/a.jpg", "{}/masks/a.png"),
    ("{}/images/a.jpg", "{}/labels/a_mask.png"),
    ("{}/a.jpg", "{}/a_mask.png"),
    ("wrapped/images/{}/deep/a.JPG", "wrapped/masks/{}/deep/a.png"),
]


@pytest.mark.parametrize(("image", "mask"), LAYOUTS)
@pytest.mark.parametrize(
    "splits", [("train", "val"), ("training", "validation"), ("Train", "Valid"), ("train", "test")]
)
def test_layouts(tmp_path: Path, image: str, mask: str, splits: tuple[str, str]) -> None:
    for split in splits:
        pair(tmp_path, image.format(split), mask.format(split))
    for files, split in zip(find_masks(tmp_path), splits, strict=True):
        assert files is not None and not files.problems and split in str(files.paths[0])
        assert np.array_equal(files.load(0)[1].numpy(), CLASSES)


def test_layout_of_pascal_voc(tmp_path: Path) -> None:
    """Its lists for segmentation count, not those for detection; 255 is the border."""
    palette = Image.fromarray(np.where(CLASSES == 1, 255, CLASSES).astype(np.uint8), mode="P")
    palette.putpalette(bytes(range(256)) * 3)
    for name in ("a", "b", "c"):
        pair(tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", palette)
    for task, train in (("Main", "c"), ("Segmentation", "a")):
        (tmp_path / "ImageSets" / task).mkdir(parents=True)
        (tmp_path / "ImageSets" / task / "train.txt").write_text(f"{train}\n")
        (tmp_path / "ImageSets" / task / "val.txt").write_text("b\nmissing\n")
    train, val = find_masks(tmp_path)
    assert val is not None and [path.stem for files in (train, val) for path in files.paths] == ["a", "b"]
    assert val.problems == ["names in the list without an image: 1, such as missing"]
    assert np.array_equal(train.load(0)[1].numpy(), np.where(CLASSES == 1, 255, CLASSES))


def test_layout_of_cityscapes(tmp_path: Path) -> None:
    """Ids of the files become the numbers of the 19 classes, as its own library tells."""
    ids = np.array([[7, 8, 11], [0, 4, 33]])
    by_id = {kind.id: kind.train_id for kind in Cityscapes.classes}
    for split in ("train", "val"):
        place = f"{split}/ulm/ulm_000001_000019"
        pair(tmp_path, f"leftImg8bit/{place}_leftImg8bit.png", f"gtFine/{place}_gtFine_labelIds.png", ids)
        for extra in ("color", "instanceIds"):
            Image.fromarray(ids.astype(np.uint8)).save(tmp_path / f"gtFine/{place}_gtFine_{extra}.png")
    train, val = find_masks(tmp_path)
    assert val is not None and not train.problems
    assert (train.num_classes, train.names[:2]) == (19, ["road", "sidewalk"])
    assert train.load(0)[1].tolist() == [[by_id[number] for number in row] for row in ids.tolist()]
    assert [by_id[number] for number in (0, 4)] == [255, 255]


def colours_of(table: dict[tuple[int, int, int], int]) -> np.ndarray:
    by_class = {number: colour for colour, number in table.items()}
    return np.array([[by_class[number] for number in row] for row in CLASSES.tolist()], np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
@pytest.mark.parametrize("name", ["voc", "cityscapes", "class_dict.csv", "labelmap.txt"])
def test_colour_tables(tmp_path: Path, name: str, mode: str) -> None:
    if name in ("voc", "cityscapes"):
        table = colour_table(name)
        assert not isinstance(table, str)
        colours = colours_of(dict(table.numbers))
    else:
        colours = colours_of({(0, 0, 0): 0, (128, 64, 0): 1, (9, 9, 200): 2})
        head, rows = ("name,r,g,b", "sky,0,0,0|road,128,64,0|car,9,9,200")
        if name == "labelmap.txt":
            head, rows = "# label:color_rgb:parts:actions", "sky:0,0,0::|road:128,64,0::|car:9,9,200::"
        (tmp_path / name).write_text("\ufeff" + "\n".join([head, *rows.split("|")]), encoding="utf-8")
    image = Image.fromarray(colours)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    pair(tmp_path, "images/a.png", "masks/a.png", image)
    # Numbers of a palette are taken for classes, unless a table is named.
    chosen = name if "." not in name else str(tmp_path / name) if mode == "P" else None
    files, _ = find_masks(tmp_path, colours=chosen)
    assert np.array_equal(files.load(0)[1].numpy(), CLASSES)
    assert len(files.classes) == files.num_classes == {"voc": 21, "cityscapes": 19}.get(name, 3)
    assert "colours" in files.note or name in files.note


def test_colours_of_pascal_voc() -> None:
    """The first colours are those that its development kit lists."""
    table = colour_table("voc")
    assert not isinstance(table, str)
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    assert [table.numbers[colour] for colour in known] == list(range(7))
    assert (table.numbers[(0, 64, 128)], table.numbers[(224, 224, 192)]) == (20, -1)


def test_coding_of_ade20k(tmp_path: Path) -> None:
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[..., 0], colours[..., 1] = [[0, 10, 20], [110, 0, 10]], [[3, 0, 255], [7, 1, 2]]
    pair(tmp_path, "images/a.png", "masks/a_seg.png", Image.fromarray(colours))
    files, _ = find_masks(tmp_path, colours="ade20k")
    expected = [[3, 256, 767], [2823, 1, 258]]
    assert files.num_classes == 2824 and files.load(0)[1].tolist() == expected


def test_masks_without_a_meaning_are_refused(tmp_path: Path) -> None:
    colours = Image.fromarray(colours_of({(0, 0, 0): 0, (255, 0, 0): 1, (0, 255, 0): 2}))
    pair(tmp_path / "colours", "images/a.png", "masks/a.png", colours)
    with pytest.raises(ValueError, match=r"a\.png: a mask holds numbers of classes, this one has colours; .*--colours"):
        find_masks(tmp_path / "colours")
    with pytest.raises(ValueError, match="there is no colour table rainbow"):
        find_masks(tmp_path / "colours", colours="rainbow")
    with pytest.raises(ImageError, match=r"the colour \(255, 0, 0\) is not in the colours of Pascal VOC"):
        find_masks(tmp_path / "colours", colours="voc")[0].load(0)
    pair(tmp_path / "jpeg", "images/a.png", "masks/a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: JPEG changes the values"):
        find_masks(tmp_path / "jpeg")
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        mask = Image.fromarray(CLASSES.astype(np.uint8) % 2, mode="P")
        mask.putpalette(bytes(value for number in order for value in (number * 200, 0, 0)))
        pair(tmp_path / "palettes", f"images/{name}.png", f"masks/{name}.png", mask)
    with pytest.raises(ValueError, match="give 0 different colours"):
        find_masks(tmp_path / "palettes")
    transparent = Image.new("RGBA", (4, 2), (0, 0, 0, 9))
    pair(tmp_path / "transparent", "images/a.png", "masks/a.png", transparent)
    with pytest.raises(ValueError, match="transparent pixels"):
        find_masks(tmp_path / "transparent")
    fractions = Image.fromarray(np.full((2, 4), 0.5, np.float32))
    pair(tmp_path / "fractions", "images/a.png", "masks/a.tif", fractions)
    with pytest.raises(ValueError, match="whole numbers"):
        find_masks(tmp_path / "fractions")


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_masks_of_0_and_255_are_two_classes(tmp_path: Path, mode: str) -> None:
    mask = Image.fromarray(np.where(CLASSES > 0, 255, 0).astype(np.uint8)).convert(mode)
    pair(tmp_path, "images/a.png", "masks/a.png", mask)
    files, _ = find_masks(tmp_path)
    assert files.num_classes == 2 and np.array_equal(files.load(0)[1].numpy(), CLASSES > 0)
    if mode != "1":
        assert files.note == "in masks 0 is 0, 255 is 1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1, 255), "have the values 0, 1, 255: if 255 is no class, give --ignore 255; if they are classes, number"),
        ((0, 128, 255), "have the values 0, 128, 255"),
        ((0, 1000, 65535), "give --ignore 65535"),
        ((0, 1000, 2000), "have the values 0, 1000, 2000: if they are classes"),
    ],
)
def test_numbers_that_are_no_list_of_classes_are_refused(
    tmp_path: Path, values: tuple[int, int, int], message: str
) -> None:
    pair(tmp_path, "images/a.png", "masks/a.png", Image.fromarray(np.array(values, np.uint16)[CLASSES]))
    with pytest.raises(ValueError, match=message):
        find_masks(tmp_path, ignore=())
    if values[1] == 1:
        assert find_masks(tmp_path)[0].num_classes == 2  # 255 is ignored by default
    (tmp_path / "classes.txt").write_text("".join(f"class {number}\n" for number in range(values[-1] + 1)))
    assert find_masks(tmp_path, ignore=())[0].num_classes == values[-1] + 1


def test_an_ignored_value_is_told(tmp_path: Path) -> None:
    pair(tmp_path, "images/a.png", "masks/a.png", np.where(CLASSES == 2, 11, CLASSES))
    files, _ = find_masks(tmp_path, ignore=(11,))
    assert files.note == "pixels of 11 in masks have no class" and files.num_classes == 2
    assert (files.load(0)[1].numpy() == 255).tolist() == (CLASSES == 2).tolist()
    with pytest.raises(ValueError, match="no pixel of the training masks has a class"):
        find_masks(tmp_path, ignore=(0, 1, 11))


def test_more_than_255_classes_are_learned(tmp_path: Path) -> None:
    """Also after augmentation; 65,535 stands for padding."""
    values = np.full((16, 16), 300, np.uint16)
    values[:4], values[4:8], values[8:12] = 255, 256, 2
    Image.new("RGB", (16, 16)).save((tmp_path / "images").mkdir() or tmp_path / "images" / "a.png")
    Image.fromarray(values).save((tmp_path / "masks").mkdir() or tmp_path / "masks" / "a.png")
    files, _ = find_masks(tmp_path, num_classes=400, ignore=(65535,))
    assert MaskDataset(files)[0][1].unique().tolist() == [2, 255, 256, 300]
    recipe = SegmentationRecipe(size=32, jitter=(0.5, 0.5), distort=0.0)
    augmented = MaskDataset(files, recipe)[0][1].unique().tolist()
    assert set(augmented) <= {2, 255, 256, 300, 65535} and 65535 in augmented
    assert MaskDataset(files, recipe)._empty_target().unique().tolist() == [65535]


def test_what_has_no_partner_is_listed(tmp_path: Path) -> None:
    pair(tmp_path, "images/a.png", "masks/a.png")
    for name in ("b", "c"):
        pair(tmp_path, f"images/{name}.png", f"other/{name}.png")
    pair(tmp_path, "other/d.jpg", "masks/d.png")
    pair(tmp_path, "images/e.png", "masks/e_mask.png")
    pair(tmp_path, "other/e.png", "masks/e_gt.png")
    files, _ = find_masks(tmp_path)
    assert [path.stem for path in files.paths] == ["a"]
    told = " | ".join(files.problems)
    assert "e.png: e_gt.png and e_mask.png may be the mask" in told
    assert "2 images have no mask, such as" in told and "masks have no image, such as" in told and "d.png" in told


def test_names_of_classes(tmp_path: Path) -> None:
    pair(tmp_path, "images/a.png", "masks/a.png")
    (tmp_path / "classes.txt").write_bytes("\ufeffsky\r\nroad\r\ncar\r\n".encode())
    assert find_masks(tmp_path)[0].classes == ["sky", "road", "car"]
    with pytest.raises(ValueError, match="names 3 classes, and there are to be 4"):
        find_masks(tmp_path, num_classes=4)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "_classes.csv").write_text("Pixel Value, Class\n0, sky\n1, road\n2, car\n")
    assert find_masks(tmp_path)[0].classes == ["sky", "road", "car"]


def test_named_splits(tmp_path: Path) -> None:
    for split in ("first", "second"):
        pair(tmp_path, f"images/{split}/a.png", f"masks/{split}/a.png")
    train, val = find_masks(tmp_path, train="images/first", val=str(tmp_path / "images" / "second"))
    assert val is not None and ["first" in str(train.masks[0]), "second" in str(val.masks[0])] == [True, True]


def test_a_mask_that_is_too_large_is_left_out_with_its_reason(tmp_path: Path) -> None:
    pair(tmp_path, "images/a.png", "masks/a.png")
    pair(tmp_path, "images/b.png", "masks/b.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "masks/b.png")
    files = find_masks(tmp_path)[0]
    assert files.num_classes == 3 and files.load(0)[1].shape == CLASSES.shape
    with pytest.raises(ImageError, match=r"b\.png: 20000 x 20000 pixels are more than the 50,000,000"):
        files.load(1)
    item = MaskDataset(files, SegmentationRecipe(size=32))[1]
    assert item[2] is False and "20000 x 20000" in item[4]


@pytest.mark.parametrize("value", [2**31 - 1, 70_000])
def test_more_classes_than_masks_can_hold_are_refused(value: int, tmp_path: Path) -> None:
    pair(tmp_path, "images/a.png", "masks/a.png")
    Image.fromarray(np.full(CLASSES.shape, value, np.int32)).save(tmp_path / "masks/a.tif")
    (tmp_path / "masks/a.png").unlink()
    with pytest.raises(ValueError, match=f"{value + 1:,} classes, more than 65,535"):
        find_masks(tmp_path)
