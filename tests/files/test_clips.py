"""Clips from files."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from aptvit.files.clips import read_clip
from aptvit.files.images import ImageError, open_image


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """(6, 128, 128, 3) uint8: a cup, and a square that appears before it."""
    clip = np.repeat(data.coffee()[None, 100:228, 200:328], 6, axis=0).copy()
    clip[3:, 20:60, 20:60] = 255
    return clip


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_the_same_frames_from_a_folder_an_animation_and_a_video(frames: np.ndarray, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "folder").mkdir()
    pictures = [Image.fromarray(one) for one in frames]
    for i, one in enumerate(pictures):
        one.save(tmp_path / "folder" / f"{i:02d}.png")
    pictures[0].save(tmp_path / "clip.webp", save_all=True, append_images=pictures[1:], lossless=True)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=128, height=128, pix_fmt="yuv420p", bit_rate=4_000_000)
        for one in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(one)))
        container.mux(stream.encode())
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert torch.equal(read_clip(tmp_path / "folder", as_tensor, 32), expected)
    clip = read_clip(tmp_path / "clip.webp", as_tensor, 32)  # an animation holds a frame that repeats for longer
    assert torch.equal(clip[0], expected[0]) and torch.equal(clip[-1], expected[-1])
    video = read_clip(tmp_path / "clip.mp4", as_tensor, 4)
    assert video.shape == (4, 3, 128, 128) and (video.float() - expected[:4].float()).abs().mean() < 8


def test_files_that_are_no_clips(tmp_path: Path) -> None:
    pytest.importorskip("av")
    Image.fromarray(data.coffee()).save(tmp_path / "one.png")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match="holds 1 frame"):
        read_clip(tmp_path / "one.png", as_tensor, 8)
    with pytest.raises(ImageError, match="cannot be read as a video"):
        read_clip(tmp_path / "text.mp4", as_tensor, 8)
    with pytest.raises(ImageError, match="nowhere"):
        read_clip(tmp_path / "nowhere.mp4", as_tensor, 8)


def test_damaged_animations_are_named(frames: np.ndarray, tmp_path: Path) -> None:
    first, second = Image.fromarray(frames[0]), Image.fromarray(frames[-1])
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"cut.{suffix}"
        first.save(path, save_all=True, append_images=[second])
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ImageError, match=f"cut.{suffix}") as error:
            read_clip(path, as_tensor, 8)
        assert "\n" not in str(error.value)


# Upright frames


def shown(stored: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The pixel (p, q) of a stored (H, W, 3) frame at (a p + c q, b p + d q), moved to coordinates from 0."""
    a, b, c, d = matrix
    q, p = np.mgrid[: stored.shape[0], : stored.shape[1]]
    x, y = a * p + c * q, b * p + d * q
    x, y = x - x.min(), y - y.min()
    upright = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    upright[y, x] = stored
    return upright


def four_corners(width: int = 128, height: int = 64) -> np.ndarray:
    """(H, W, 3) uint8 with another gray in each quarter."""
    gray = np.repeat(np.repeat(np.array([[250, 20], [90, 170]], np.uint8), height // 2, 0), width // 2, 1)
    return np.repeat(gray[..., None], 3, axis=2)


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)])
@pytest.mark.parametrize("swapped", [False, True])
def test_videos_are_turned_and_mirrored_as_their_header_says(
    matrix: tuple[int, int, int, int], swapped: bool, tmp_path: Path
) -> None:
    av = pytest.importorskip("av")
    a, b, c, d = (matrix[1], matrix[0], matrix[3], matrix[2]) if swapped else matrix
    stored, path = four_corners(), tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, width=128, height=64, pix_fmt="yuv420p", bit_rate=4_000_000)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # the matrix of a track header of version 0
    fixed = [value << 16 for value in (a, b, c, d)]
    content[start : start + 36] = struct.pack(">9i", fixed[0], fixed[1], 0, fixed[2], fixed[3], 0, 0, 0, 1 << 30)
    path.write_bytes(content)

    expected = torch.from_numpy(shown(stored, (a, b, c, d))).permute(2, 0, 1)
    clip = read_clip(path, as_tensor, 3)
    assert clip.shape[1:] == expected.shape
    assert all((frame.float() - expected.float()).abs().mean() < 4 for frame in clip)


@pytest.mark.parametrize("suffix", ["webp", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_animations_are_turned_by_their_exif_data(suffix: str, orientation: int, tmp_path: Path) -> None:
    stored, exif = four_corners(40, 24), Image.Exif()
    exif[0x0112] = orientation
    frames = [Image.fromarray(stored), Image.fromarray(255 - stored)]
    path = tmp_path / f"turned.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, exif=exif)
    matrices = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1)}  # of the EXIF standard
    matrices |= {5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}
    clip = read_clip(path, as_tensor, 8)
    for frame, pixels in zip(clip, (stored, 255 - stored), strict=True):
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), shown(pixels, matrices[orientation]))
    assert torch.equal(clip[0], as_tensor(open_image(path)))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_transparency_of_animations_is_over_white(suffix: str, tmp_path: Path) -> None:
    frames = []
    for column in (2, 5):
        pixels = np.zeros((8, 8, 4), np.uint8)
        pixels[:, column] = (200, 30, 60, 255)
        frames.append(Image.fromarray(pixels))
    path = tmp_path / f"clear.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, disposal=2)
    clip = read_clip(path, as_tensor, 8)
    for frame, column in zip(clip, (2, 5), strict=True):
        expected = np.full((8, 8, 3), 255, np.uint8)
        expected[:, column] = (200, 30, 60)
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)
    assert torch.equal(clip[0], as_tensor(open_image(path)))


@pytest.mark.parametrize("kind", ["m3u8", "ffconcat"])
def test_a_playlist_is_not_followed(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    visitors = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        texts = {
            "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{url}/a.ts\n#EXT-X-ENDLIST\n",
            "ffconcat": f"ffconcat version 1.0\nfile {url}/a.mp4\n",
        }
        (tmp_path / "a.mp4").write_text(texts[kind])
        with pytest.raises(ImageError, match="cannot be read as a video"):
            read_clip(tmp_path / "a.mp4", as_tensor, 4)
        with pytest.raises(TimeoutError):
            visitors.append(server.accept())
    assert not visitors
