"""Clips from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from aptvit.files.clips import read_clip
from aptvit.files.images import ImageError


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
