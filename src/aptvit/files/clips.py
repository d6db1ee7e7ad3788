"""Clips from files: a video, an animated image, or a folder of frames."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from aptvit.files.images import ImageError, find_images, identify, open_image, upright_rgb

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["read_clip"]

_TURNS = {  # of a display matrix: axes swapped, x mirrored, y mirrored -> operation that makes the frame upright
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}


def read_clip(path: Path, transform: Callable[[Image.Image], Any], frames: int) -> Tensor:
    """Read the first frames of a clip, upright and as `open_image` reads images: EXIF data, transparency over white.

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
        with identify(path) as file:
            return [upright_rgb(frame) for frame in islice(ImageSequence.Iterator(file), frames)]
    except UnidentifiedImageError:
        return []
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # decoders meet damaged data with nearly any exception
        raise ImageError(f"{path} cannot be decoded: {' '.join(str(error).split())}") from error


def _of_video(path: Path, frames: int) -> list[Image.Image]:
    try:
        import av
    except ImportError:
        raise ImportError("videos are read by PyAV: pip install 'aptvit[video]'") from None
    try:
        with av.open(str(path)) as container:
            return [_upright(frame) for frame in islice(container.decode(video=0), frames)]
    except (av.FFmpegError, IndexError) as error:
        raise ImageError(f"{path} cannot be read as a video: {' '.join(str(error).split())}") from None


def _upright(frame: VideoFrame) -> Image.Image:
    """A frame, turned and mirrored by quarter turns as players do it."""
    image: Image.Image = frame.to_image()
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # Rows (a, b, u), (c, d, v), (x, y, w): the pixel (p, q) is shown at (a p + c q, b p + d q).
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
    swapped = abs(b) > abs(a)
    turn = _TURNS.get((swapped, c < 0, b < 0) if swapped else (False, a < 0, d < 0))
    return image if turn is None else image.transpose(turn)
