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
    """The first frames of a clip.

    Args:
        path: A video, an animated picture, or a folder of frames in the order of their names.
        transform: From a frame to (C, H, W) uint8.
        frames: How many at most.

    Returns:
        (T, C, H, W) uint8.

    Raises:
        ImageError: If it cannot be read, or has fewer than two frames.
        ImportError: If a video is to be read without PyAV.
    """
    if path.is_dir():
        found = [open_image(file) for file in find_images([path])[:frames]]
    else:
        found = _of_picture(path, frames) or _of_video(path, frames)
    if len(found) < 2:
        raise ImageError(f"{path} holds {len(found)} frame: give a video, an animated picture or a folder of frames")
    return torch.stack([torch.as_tensor(transform(one)) for one in found])


def _of_picture(path: Path, frames: int) -> list[Image.Image]:
    """Frames of an animated picture; none if it is no picture."""
    try:
        with Image.open(path) as picture:
            return [one.convert("RGB") for one in islice(ImageSequence.Iterator(picture), frames)]
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
            return [one.to_image() for one in islice(container.decode(video=0), frames)]
    except (av.FFmpegError, IndexError) as error:
        raise ImageError(f"{path} cannot be read as a video: {' '.join(str(error).split())}") from None
