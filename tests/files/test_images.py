from __future__ import annotations

import io
import os
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from aptvit.files import images
from aptvit.files.images import ImageError, UnreadImagesWarning, find_images, open_image

CORNERS = {"top left": (255, 0, 0), "top right": (0, 255, 0), "bottom left": (0, 0, 255), "bottom right": (250, 250, 0)}


def pixels(path: Path, max_side: int | None = None) -> np.ndarray:
    image = open_image(path, max_side)
    assert image.mode == "RGB"
    return np.asarray(image)


def jpeg_bytes(size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# find_images


def test_folders_are_searched_recursively_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/2.PNG", "b/10.jpg", "a.JPeG", "c.webp", "b/deep/er/x.tif"]
    for name in names:
        touch(tmp_path / name)
    touch(tmp_path / "notes.txt")
    result = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert result == ["a.JPeG", "b/10.jpg", "b/2.PNG", "b/deep/er/x.tif", "c.webp"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path / ".thumbnails" / "a.jpg")
    touch(tmp_path / "._b.jpg")
    visible = touch(tmp_path / "c.jpg")
    assert find_images([tmp_path]) == [visible]


def test_explicit_files_keep_their_order_and_need_no_suffix(tmp_path: Path) -> None:
    odd, usual = touch(tmp_path / "z.scan"), touch(tmp_path / "a.jpg")
    assert find_images([odd, str(usual)]) == [odd, usual]


def test_duplicates_are_removed(tmp_path: Path) -> None:
    b, a = touch(tmp_path / "b.jpg"), touch(tmp_path / "a.jpg")
    (tmp_path / "x").mkdir()
    assert find_images([b, tmp_path, b, tmp_path / "x" / ".." / "a.jpg"]) == [b, a]


def test_a_lone_string_is_one_path(tmp_path: Path) -> None:
    photo = touch(tmp_path / "a.jpg")
    assert find_images(str(tmp_path)) == [photo]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    photo = touch(tmp_path / "a.jpg")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert find_images([tmp_path]) == [photo]


def test_nothing_to_find_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no paths given"):
        find_images([])
    with pytest.raises(ValueError, match=r"nowhere\.jpg does not exist"):
        find_images([tmp_path / "nowhere.jpg"])
    touch(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=f"no images found in {tmp_path}"):
        find_images([tmp_path])


# open_image: what a picture looks like


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "top_left", "top_right", "size"),
    [
        (1, "top left", "top right", (40, 24)),
        (2, "top right", "top left", (40, 24)),
        (3, "bottom right", "bottom left", (40, 24)),
        (4, "bottom left", "bottom right", (40, 24)),
        (5, "top left", "bottom left", (24, 40)),
        (6, "bottom left", "top left", (24, 40)),
        (7, "bottom right", "top right", (24, 40)),
        (8, "top right", "bottom right", (24, 40)),
    ],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, suffix: str, orientation: int, top_left: str, top_right: str, size: tuple[int, int]
) -> None:
    image = Image.new("RGB", (40, 24))
    for i, colour in enumerate(CORNERS.values()):
        image.paste(colour, (20 * (i % 2), 12 * (i // 2), 20 * (i % 2) + 20, 12 * (i // 2) + 12))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    upright = open_image(tmp_path / f"a.{suffix}")
    assert upright.size == size
    assert np.allclose(np.asarray(upright)[3, 3], CORNERS[top_left], atol=12)
    assert np.allclose(np.asarray(upright)[3, -4], CORNERS[top_right], atol=12)
    # Whoever applies the orientation once more must not turn the picture again.
    assert upright.getexif().get(0x0112, 1) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("damaged", [b"Exif\0\0MM\0*garbage", b"Exif\0\0garbage, and no more", b"Exif\0\0"])
def test_damaged_exif_does_not_cost_the_photo(tmp_path: Path, damaged: bytes) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", exif=damaged)
    assert (pixels(tmp_path / "a.png") == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composited_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    image.convert(mode).save(tmp_path / ("a.tif" if mode == "PA" else "a.png"))
    path = next(tmp_path.iterdir())
    assert pixels(path)[0, :, 0].tolist() == [0, 255, 204]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entries_become_white(tmp_path: Path, suffix: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"a.{suffix}", transparency=0)
    assert pixels(tmp_path / f"a.{suffix}")[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [9, 9, 9]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_exactly(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 1000, 25700, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = [0, 0, 1, 1, 4, 100, 156, 255]
    assert pixels(tmp_path / f"a.{suffix}")[0].tolist() == [[v, v, v] for v in expected]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 1_000_000]], dtype=np.int32), [0, 255]),
        (np.array([[0.0, 0.2, 1.0]], dtype=np.float32), [0, 51, 255]),
        (np.array([[0.0, 7.0, 255.0]], dtype=np.float32), [0, 7, 255]),
        (np.array([[0.0, 257.0, 65535.0]], dtype=np.float32), [0, 1, 255]),
        (np.array([[np.nan, np.inf, 1.0]], dtype=np.float32), [0, 0, 255]),
        (np.array([[-1.0, 1.0]], dtype=np.float32), [0, 255]),
    ],
)
def test_wide_gray_is_scaled(tmp_path: Path, values: np.ndarray, expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == expected


def test_gray_one_bit_and_palette(tmp_path: Path) -> None:
    photo = Image.fromarray(data.camera()).resize((32, 32))
    for mode in ("L", "1", "P"):
        picture = photo.convert(mode)
        picture.save(tmp_path / f"{mode}.png")
        assert np.array_equal(pixels(tmp_path / f"{mode}.png"), np.asarray(picture.convert("RGB")))


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.allclose(pixels(tmp_path / "a.jpg"), (255, 0, 0), atol=6)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert np.allclose(pixels(tmp_path / f"a.{suffix}"), (255, 0, 0), atol=2)


# open_image: size


def test_a_hundred_megapixels_are_opened_quietly(tmp_path: Path) -> None:
    Image.new("1", (12500, 8000), 1).save(tmp_path / "a.png")
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(tmp_path / "a.png", max_side=500)
    assert image.size == (962, 616)
    assert image.getextrema() == ((255, 255),) * 3
    assert limit == Image.MAX_IMAGE_PIXELS


def test_more_than_pillows_limit_is_opened_and_the_limit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for suffix in ("png", "jpg", "tif", "webp", "gif", "bmp"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"a.{suffix}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_image(tmp_path / f"a.{suffix}").size == (64, 64)
        assert Image.MAX_IMAGE_PIXELS == 100


def test_the_limit_stays_when_threads_open_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    sizes: list[tuple[int, int]] = []
    threads = [
        threading.Thread(target=lambda: sizes.extend(open_image(tmp_path / "a.jpg").size for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(64, 48)] * 80
    assert Image.MAX_IMAGE_PIXELS == 100


def test_more_than_two_hundred_megapixels_are_refused_quietly(tmp_path: Path) -> None:
    Image.new("1", (20001, 10000)).save(tmp_path / "big.png")
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"big\.png: 20001 x 10000 pixels are more than the 200,000,000"):
            open_image(tmp_path / "big.png")
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("size", [(1000, 700), (300, 1000), (999, 1), (513, 512)])
@pytest.mark.parametrize("max_side", [1, 40, 256])
def test_max_side_leaves_from_one_to_two_times_of_it(
    tmp_path: Path, suffix: str, size: tuple[int, int], max_side: int
) -> None:
    Image.new("RGB", size, (200, 30, 90)).save(tmp_path / f"a.{suffix}", quality=95)
    image = open_image(tmp_path / f"a.{suffix}", max_side)
    assert max_side <= max(image.size) <= 2 * max_side
    assert np.allclose(np.asarray(image), (200, 30, 90), atol=4)
    assert abs(image.size[0] - size[0] * max(image.size) / max(size)) <= 1


def test_max_side_does_not_change_smaller_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes())
    assert np.array_equal(pixels(tmp_path / "a.jpg", max_side=32), pixels(tmp_path / "a.jpg"))


def test_max_side_decodes_a_jpeg_at_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes((1600, 1200)))
    sizes = []
    to_rgb = images._to_rgb

    def spy(image: Image.Image) -> Image.Image:
        sizes.append(image.size)
        return to_rgb(image)

    monkeypatch.setattr(images, "_to_rgb", spy)
    assert open_image(tmp_path / "a.jpg", max_side=200).size == (200, 150)
    assert sizes == [(200, 150)]


def test_max_side_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_side is 0"):
        open_image(tmp_path / "a.jpg", max_side=0)


# open_image: what cannot be opened


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "the file is empty"),
        ("text.jpg", b"Dear diary, today I took no photo.\n" * 9, "not an image"),
        ("cut.jpg", jpeg_bytes()[:900], "cannot be decoded"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "cannot be decoded|not an image"),
    ],
)
def test_bad_files_are_named_with_the_reason_on_one_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}: .*({reason})") as error:
        open_image(tmp_path / name)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_folders_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="this is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"gone\.jpg: the file does not exist"):
        open_image(tmp_path / "gone.jpg")


def test_no_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = touch(tmp_path / "secret.jpg")
    path.chmod(0)
    if os.access(path, os.R_OK):  # the administrator may read everything

        def refuse(*args: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageError, match=r"secret\.jpg: no permission"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["png", "gif", "tif", "webp", "jpg", "bmp", "ppm"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_files_open_or_raise_image_error(tmp_path: Path, suffix: str, damage: str) -> None:
    Image.fromarray(data.astronaut()).resize((48, 48)).save(tmp_path / f"good.{suffix}")
    good = (tmp_path / f"good.{suffix}").read_bytes()
    path = tmp_path / f"bad.{suffix}"
    chance = random.Random(7)
    refused = 0
    for _ in range(40):
        content = bytearray(good[: chance.randrange(1, len(good))] if damage == "cut" else good)
        for _ in range(0 if damage == "cut" else 8):
            content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                open_image(path)
            except ImageError as error:
                refused += 1
                assert str(error).startswith(f"{path}: ")
                assert "\n" not in str(error)
    assert refused


# HEIC and AVIF


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without pillow-heif, and with a Pillow that was built without AVIF."""
    endings = {ending: name for ending, name in Image.registered_extensions().items() if ending != ".avif"}
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "registered_extensions", lambda: endings)
    images._reads_heif.cache_clear()
    yield
    images._reads_heif.cache_clear()


@pytest.mark.usefixtures("without_heif")
def test_a_folder_names_what_needs_another_library(tmp_path: Path) -> None:
    for name in ("a.HEIC", "b.heic", "c.avif", "d.jpg"):
        touch(tmp_path / name)
    with pytest.warns(UnreadImagesWarning) as caught:
        assert find_images([tmp_path]) == [tmp_path / "d.jpg"]
    line = str(caught[0].message)
    assert line == (
        f"{tmp_path}: 1 .avif file and 2 .heic files left out: pip install 'aptvit[heif]' reads them"
    ) and caught[0].filename.endswith("test_images.py")
    (tmp_path / "d.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 \.heic files left out: pip install 'aptvit\[heif\]'"):
        find_images([tmp_path])
    with pytest.raises(ValueError) as empty:
        find_images([tmp_path / "a.HEIC", touch(tmp_path / "notes" / "a.txt").parent][1:])
    assert ".heic" not in str(empty.value) and ".avif" not in str(empty.value) and ".jpg" in str(empty.value)


@pytest.mark.usefixtures("without_heif")
def test_a_heic_file_names_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
    assert find_images([tmp_path / "a.heic"]) == [tmp_path / "a.heic"]  # a file named explicitly is not searched for
    with pytest.raises(ImageError, match=r"a\.heic: .*pip install 'aptvit\[heif\]'"):
        open_image(tmp_path / "a.heic")


@pytest.mark.parametrize("suffix", ["heic", "heif", "avif"])
def test_heic_and_avif_are_read_where_the_libraries_are(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("Pillow was built without AVIF")
    if suffix != "avif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    stored, exif = np.zeros((48, 80, 3), np.uint8), Image.Exif()
    stored[:24, :40] = (250, 30, 30)  # the top left quarter
    exif[0x0112] = 6  # viewers turn it by 90 degrees, clockwise
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif.tobytes(), quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_images([tmp_path]) == [tmp_path / f"a.{suffix}"]
    expected = np.rot90(stored, -1).astype(float)
    for content in (None, (tmp_path / f"a.{suffix}").read_bytes()):
        upright = np.asarray(open_image(tmp_path / f"a.{suffix}", data=content), dtype=float)
        assert upright.shape == expected.shape and np.abs(upright - expected).mean() < 4


def test_images_with_transparency_count_twice(tmp_path: Path) -> None:
    sizes = {"L": (10_001, 10_000), "LA": (10_001, 10_000)}
    for mode, size in sizes.items():
        Image.new(mode, size).save(tmp_path / f"{mode}.png")
    assert open_image(tmp_path / "L.png", max_side=100).width <= 200
    with pytest.raises(ImageError, match="10001 x 10000 pixels are more than the 100,000,000"):
        open_image(tmp_path / "LA.png")


def test_images_that_are_lines_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1000, 1)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (1000, 1)
    Image.new("RGB", (1, 1001)).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match="1 x 1001 pixels are longer than 1000 times their width"):
        open_image(tmp_path / "b.png")


@pytest.mark.parametrize("values", ["floats", "integers"])
def test_large_gray_images_are_converted_in_parts(values: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gray = np.random.default_rng(0).uniform(-5, 1e5, (40, 30)).astype(np.float32 if values == "floats" else np.int32)
    Image.fromarray(gray).save(tmp_path / "a.tif")
    whole = pixels(tmp_path / "a.tif")
    monkeypatch.setattr(images, "_FLOATS", 90)
    assert np.array_equal(pixels(tmp_path / "a.tif"), whole) and len(np.unique(whole)) > 100
