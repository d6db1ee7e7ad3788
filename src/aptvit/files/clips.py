"""Clips from files: a video, an animated image, or a folder of frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from aptvit.files.images import MAX_PIXELS, ImageError, find_images, open_image, opened, upright_rgb
from aptvit.files.regular import open_regular
from aptvit.files.text import printable

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["read_clip"]

_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf,gif,mjpeg,h264,hevc,m4v,ivf,yuv4mpegpipe"
)
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
    read: Iterator[Image.Image]
    if path.is_dir():
        read = (open_image(file) for file in find_images([path])[:frames])
    else:
        read = _of_image_file(path, frames) if _is_image(path) else _of_video(path, frames)
    # Frames are transformed as they are read: only the small ones are kept.
    images = [torch.as_tensor(transform(image)) for image in read]
    if len(images) < 2:
        raise ImageError(
            f"{printable(path)} holds {len(images)} frame: give a video, an animated image or a folder of frames"
        )
    return torch.stack(images)


def _is_image(path: Path) -> bool:
    try:
        with opened(path):
            return True
    except UnidentifiedImageError:
        return False
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"{printable(path)}: {error.strerror or error}") from None
    except Exception as error:  # decoders meet damaged data with nearly any exception
        raise ImageError(f"{printable(path)} cannot be decoded: {' '.join(str(error).split())}") from error


def _of_image_file(path: Path, frames: int) -> Iterator[Image.Image]:
    """Frames of an animated image."""
    try:
        with opened(path) as file:
            for frame in islice(ImageSequence.Iterator(file), frames):
                yield upright_rgb(frame)
    except Exception as error:  # as above
        raise ImageError(f"{printable(path)} cannot be decoded: {' '.join(str(error).split())}") from error


def _of_video(path: Path, frames: int) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError:
        raise ImportError("videos are read by PyAV: pip install 'aptvit[video]'") from None
    # A playlist names further files and addresses: containers of frames are read, from this file alone.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"}
    try:
        with open_regular(path) as file, av.open(file, "r", container_options=options) as container:
            container.streams.video[0].codec_context.options = {"max_pixels": str(MAX_PIXELS // 4)}
            for frame in islice(container.decode(video=0), frames):
                yield _upright(frame)
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise ImageError(f"{printable(path)} cannot be read as a video: {' '.join(str(error).split())}") from None


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
