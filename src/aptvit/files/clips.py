"""Clips from files: a video, an animated image, or a folder of frames."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from aptvit.files.images import ImageError, find_images, open_image

__all__ = ["read_clip"]


def read_clip(path: Path, transform: Callable[[Image.Image], Any], frames: int) -> Tensor:
    """Read the first frames of a clip.

    Args:
        path: A video, an animated image, or a folder of frames in the order of their names.
        transform: From a frame to (C, H, W) uint8.
        frames: Most frames to read.

    Returns:
        (T, C, H, W) uint8.

    Raises:
        ImageError: If the clip cannot be read, or has fewer than two frames.
        ImportError: If the clip is a video and PyAV is not installed.
    """
    if path.is_dir():
        images = [open_image(file) for file in find_images([path])[:frames]]
    else:
        images = _of_image_file(path, frames) or _of_video(path, frames)
    if len(images) < 2:
        raise ImageError(f"{path} holds {len(images)} frame: give a video, an animated image or a folder of frames")
    return torch.stack([torch.as_tensor(transform(image)) for image in images])


def _of_image_file(path: Path, frames: int) -> list[Image.Image]:
    """Frames of an animated image; empty if the file is not an image."""
    try:
        with Image.open(path) as file:
            return [frame.convert("RGB") for frame in islice(ImageSequence.Iterator(file), frames)]
    except UnidentifiedImageError:
        return []
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None


def _of_video(path: Path, frames: int) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise ImportError("videos are read by PyAV: pip install 'aptvit[video]'") from None
    try:
        with av.open(str(path)) as container:
            return [frame.to_image() for frame in islice(container.decode(video=0), frames)]
    except (av.FFmpegError, IndexError) as error:
        raise ImageError(f"{path} cannot be read as a video: {' '.join(str(error).split())}") from None
