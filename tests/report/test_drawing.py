from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aptvit.report.drawing import SCALE_COLOURS, draw_patches, draw_scores, save_png, side_by_side, to_data_uri

P = 16
# A 64 x 64 image: one patch of 32, the rest base patches.
MIXED = np.array([(0, 0, 32)] + [(y, x, P) for y in range(0, 64, P) for x in range(0, 64, P) if y >= 32 or x >= 32])


def uniform(height: int, width: int, size: int = P) -> np.ndarray:
    return np.array([(y, x, size) for y in range(0, height, size) for x in range(0, width, size)])


def gray(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "drawn"),
    [
        (224, 224, (896, 896)),
        (384, 256, (768, 512)),
        (16, 16, (768, 768)),
        (768, 32, (768, 32)),
        (800, 800, (800, 800)),
    ],
)
def test_small_photos_are_enlarged_by_a_whole_number(height: int, width: int, drawn: tuple[int, int]) -> None:
    picture = draw_patches(gray(height, width), uniform(height, width), P)
    assert picture.mode == "RGB"
    assert (picture.height, picture.width) == drawn


def test_base_patches_share_one_white_line() -> None:
    drawn = np.asarray(draw_patches(gray(64, 64), uniform(64, 64), P))[..., 0]
    line, photo = round(0.25 * 90 + 0.75 * 255), 90
    on_line = np.arange(768) % (P * 12) == 0
    expected = np.where(on_line[:, None] | on_line[None, :], line, photo)
    assert np.array_equal(drawn, expected)


def test_coarser_patches_are_tinted_and_framed() -> None:
    drawn = np.asarray(draw_patches(gray(64, 64), MIXED, P)).astype(float)
    colour = np.array(SCALE_COLOURS[1])
    frame, inside = 0.15 * 90 + 0.85 * colour, 0.86 * 90 + 0.14 * colour
    side = 32 * 12
    expected = np.empty((side, side, 3))
    expected[:] = frame
    expected[2:-2, 2:-2] = inside
    assert np.abs(drawn[:side, :side] - expected).max() <= 0.5 + 1e-9
    assert (drawn[side + 1 : side + 100, side + 1 : side + 100] == 90).all()


def test_scales_have_different_colours_and_huge_ones_are_drawn() -> None:
    inside = [
        np.asarray(draw_patches(gray(size, size), np.array([(0, 0, size)]), 1))[50, 50] for size in (1, 2, 4, 8, 16, 64)
    ]
    assert len({tuple(colour) for colour in inside[:5]}) == 5
    assert np.array_equal(inside[4], inside[5])


def test_the_photo_stays_visible() -> None:
    photo = np.zeros((64, 64, 3), dtype=np.uint8)
    photo[:, :16] = 255
    drawn = np.asarray(draw_patches(photo, MIXED, P)).astype(int)
    assert (drawn[100, 100] - drawn[100, 300] > 150).all()


def test_order_of_the_patches_does_not_matter() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    first = np.asarray(draw_patches(photo, MIXED, P))
    assert np.array_equal(first, np.asarray(draw_patches(photo, MIXED[::-1].astype(np.int32), P)))


def test_wide_images_put_y_first() -> None:
    patches = np.array([(0, 0, 32), (0, 32, P), (0, 48, P), (16, 32, P), (16, 48, P)])
    drawn = np.asarray(draw_patches(gray(32, 64), patches, P))
    assert drawn.shape == (384, 768, 3)
    assert tuple(drawn[200, 200]) != (90, 90, 90)
    assert tuple(drawn[250, 500]) == (90, 90, 90)


@pytest.mark.parametrize(
    "patches",
    [
        uniform(64, 64)[1:],
        np.concatenate([uniform(64, 64)[1:], [(32, 32, P)]]),
        uniform(64, 80),
        MIXED + np.array([8, 0, 0]),
        np.array([(0, 0, 48)]),
        np.zeros((0, 3), dtype=int),
    ],
    ids=["hole", "overlap", "outside", "off the grid", "size", "none"],
)
def test_patches_that_do_not_tile_the_image_are_refused(patches: np.ndarray) -> None:
    with pytest.raises(ValueError, match="64 x 64 image"):
        draw_patches(gray(64, 64), patches, P)


def test_scores_are_drawn_in_place_from_dark_to_bright() -> None:
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    picture = draw_scores(scores, (48, 64), P)
    assert picture.width == 768
    assert picture.height > 576
    drawn = np.asarray(picture).astype(int)
    cells = drawn[:576].reshape(3, 192, 4, 192, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    lightness = (cells[:, 0, :, 0] @ np.array([0.2126, 0.7152, 0.0722])).ravel()
    assert (np.diff(lightness) > 5).all()


def test_what_has_no_score_is_dark_gray() -> None:
    scores = np.array([[0.0, np.nan], [np.inf, 1.0]])
    drawn = np.asarray(draw_scores(scores, (40, 40), P))
    dark = drawn[-1, -1]
    assert drawn.shape[1] == 800
    for y, x in ((10, 400), (400, 10), (10, 700), (700, 10), (700, 700)):
        assert np.array_equal(drawn[y, x], dark)
    assert not np.array_equal(drawn[10, 10], dark)
    assert not np.array_equal(drawn[400, 400], dark)


@pytest.mark.parametrize("scores", [np.full((2, 2), 3.0), np.full((2, 2), np.nan), np.zeros((0, 0))])
def test_scores_without_a_range_are_drawn(scores: np.ndarray) -> None:
    with np.errstate(all="raise"):
        assert draw_scores(scores, (32, 32), P).width == 768


def test_the_legend_shows_the_values() -> None:
    one = np.asarray(draw_scores(np.array([[0.0, 1.0]]), (16, 32), P))
    ten = np.asarray(draw_scores(np.array([[0.0, 10.0]]), (16, 32), P))
    assert np.array_equal(one[:384], ten[:384])
    assert not np.array_equal(one[384:], ten[384:])


def test_scores_must_be_a_map() -> None:
    with pytest.raises(ValueError, match=r"\(4,\)"):
        draw_scores(np.zeros(4), (32, 32), P)


def test_save_png_makes_the_folder_and_keeps_pixels(tmp_path: Path) -> None:
    picture = draw_patches(gray(64, 64), MIXED, P)
    path = save_png(picture, tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*b\.png"):
        save_png(picture, tmp_path / "file" / "b.png")


def test_data_uri_holds_the_picture() -> None:
    picture = draw_patches(gray(64, 64), MIXED, P)
    kind, content = to_data_uri(picture, quality=90).split(",")
    assert kind == "data:image/jpeg;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)
    assert np.abs(decoded - np.asarray(picture)).mean() < 3
    assert len(to_data_uri(picture, quality=30)) < len(content)


def test_side_by_side_keeps_each_picture() -> None:
    red, blue = Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 5), "blue")
    row = np.asarray(side_by_side([red, blue], gap=4))
    assert row.shape == (20, 44, 3)
    assert (row[:, :10] == (255, 0, 0)).all()
    assert (row[:5, 14:] == (0, 0, 255)).all()
    assert (row[5:, 14:] == row[0, 10]).all()
    with pytest.raises(ValueError, match="at least one"):
        side_by_side([])
