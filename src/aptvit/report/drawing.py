"""Patches and scores, drawn on images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aptvit.storage.writing import replacing

SCALE_COLOURS = ((255, 255, 255), (38, 198, 182), (255, 176, 46), (214, 92, 255), (90, 140, 255))
"""RGB colours of base patches, of patches of twice the size, and so on; the last colour is that of all larger sizes."""

_MIN_SIDE = 768
_DARK = (27, 28, 32)
# From dark to bright in even steps of lightness, so that equal differences of the score look equal.
_RAMP = np.array(
    [(20, 17, 52), (76, 30, 112), (140, 41, 120), (199, 63, 98), (239, 112, 68), (250, 178, 82), (253, 245, 205)]
)


def draw_patches(image: np.ndarray, patches: np.ndarray, patch_size: int) -> Image.Image:
    """Draw the patch borders over an image, coarser patches tinted in the colour of their scale.

    Args:
        image: (H, W, 3) uint8.
        patches: (n, 3) integer rows (y, x, size) in pixels that tile the image; sizes are `patch_size` times 1, 2, 4...
        patch_size: Side of a base patch in pixels.

    Returns:
        The drawing, a whole number of times larger than `image` so that the longer side is at least 768 pixels.

    Raises:
        ValueError: The patches do not tile the image.
    """
    height, width = image.shape[:2]
    zoom = _zoom(height, width)
    owner = _owners(np.asarray(patches, dtype=np.int64), patch_size, height, width)
    top, left, size = np.moveaxis(_enlarge(np.asarray(patches)[owner], patch_size * zoom) * zoom, -1, 0)
    row = np.arange(height * zoom)[:, None] - top
    column = np.arange(width * zoom)[None, :] - left
    scale = np.log2(size // (patch_size * zoom)).astype(np.int64)

    thin = max(1, round(max(height, width) * zoom / 900))
    # Base patches share one line between neighbours; a coarser patch has a frame of its own, inside it.
    base_line = (scale == 0) & (np.minimum(row, column) < thin)
    inside = np.minimum(np.minimum(row, column), np.minimum(size - 1 - row, size - 1 - column))
    frame = (scale > 0) & (inside < 2 * thin)
    opacity = np.select([base_line, frame, scale > 0], [0.75, 0.85, 0.14], 0.0)[..., None]

    enlarged = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    colour = np.array(SCALE_COLOURS)[np.minimum(scale, len(SCALE_COLOURS) - 1)]
    # A little darker underneath, or white lines would vanish on bright images.
    drawn = 0.9 * np.asarray(enlarged) * (1 - opacity) + colour * opacity
    return Image.fromarray(np.rint(drawn).astype(np.uint8))


def draw_scores(scores: np.ndarray, image_size: tuple[int, int], cell: int) -> Image.Image:
    """Draw a score map as a heat map, dark for its smallest and bright for its largest value, with a legend below.

    Args:
        scores: (h, w) floats. Scores that are not finite are drawn dark gray.
        image_size: Height and width in pixels of the scored image; its pixels outside the map are dark gray.
        cell: Side in pixels of the square of the image that a score is for.

    Returns:
        The drawing, enlarged like that of `draw_patches`, and taller by the legend.

    Raises:
        ValueError: `scores` is not two-dimensional.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores have the shape {scores.shape}; give a map of two dimensions")
    height, width = image_size
    zoom = _zoom(height, width)
    finite = np.isfinite(scores)
    low, high = (float(scores[finite].min()), float(scores[finite].max())) if finite.any() else (math.nan, math.nan)
    level = np.where(finite, (scores - low) / (high - low) if high > low else 0.0, 0.0)
    colours = np.where(finite[..., None], heat_colours(level), np.array(_DARK, dtype=np.uint8))
    cells = _enlarge(colours, cell * zoom)[: height * zoom, : width * zoom]

    legend = 44
    canvas = Image.new("RGB", (width * zoom, height * zoom + legend), _DARK)
    canvas.paste(Image.fromarray(np.ascontiguousarray(cells)), (0, 0))
    _draw_legend(canvas, height * zoom, legend, f"{low:.4g}", f"{high:.4g}")
    return canvas


def save_png(image: Image.Image, path: Path | str) -> Path:
    """Write a PNG file, creating its folder, and return its path.

    Raises:
        ValueError: The file cannot be written.
    """
    path = Path(path)
    try:
        with replacing(path) as draft:
            image.save(draft, "PNG")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot write {path} ({reason}); choose another file") from error
    return path


def to_data_uri(image: Image.Image, quality: int = 82) -> str:
    """Encode as a JPEG `data:` address for embedding in HTML; `quality` is 1 to 95."""
    buffer = io.BytesIO()
    # Without colour subsampling, which would smear thin coloured lines.
    image.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def side_by_side(images: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    """Put images in a row, tops aligned, `gap` pixels apart on dark gray.

    Raises:
        ValueError: `images` is empty.
    """
    if not images:
        raise ValueError("no images to put side by side; give at least one")
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), _DARK)
    x = 0
    for image in images:
        row.paste(image, (x, 0))
        x += image.width + gap
    return row


def _zoom(height: int, width: int) -> int:
    return math.ceil(max(1.0, _MIN_SIDE / max(height, width)))


def _enlarge(cells: np.ndarray, step: int) -> np.ndarray:
    return cells.repeat(step, axis=0).repeat(step, axis=1)


def _owners(patches: np.ndarray, patch_size: int, height: int, width: int) -> np.ndarray:
    """For each base cell of the image the row of `patches` that covers it."""
    owner = np.full((height // patch_size, width // patch_size), -1)
    y, x, size = patches.T
    cells = size // patch_size
    on_grid = (patches % patch_size == 0).all() and (cells > 0).all() and (cells & (cells - 1) == 0).all()
    inside = (patches >= 0).all() and (y + size <= height).all() and (x + size <= width).all()
    if not (on_grid and inside and (size**2).sum() == height * width):
        raise ValueError(f"patches do not tile the {height} x {width} image with base patches of {patch_size} pixels")
    for count in np.unique(cells):
        rows = np.flatnonzero(cells == count)
        offset = np.arange(count)
        owner[
            (y[rows] // patch_size)[:, None, None] + offset[:, None],
            (x[rows] // patch_size)[:, None, None] + offset,
        ] = rows[:, None, None]
    if (owner < 0).any():
        raise ValueError(f"patches overlap and leave holes in the {height} x {width} image")
    return owner


def heat_colours(levels: np.ndarray) -> np.ndarray:
    """RGB colours of levels from 0 to 1, from dark to bright. (...) -> (..., 3) uint8"""
    stops = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.rint(np.interp(levels, stops, channel)).astype(np.uint8) for channel in _RAMP.T], axis=-1)


def _draw_legend(canvas: Image.Image, top: int, height: int, low: str, high: str) -> None:
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(18)
    middle, margin = top + height // 2, 12
    start = margin + int(draw.textlength(low, font)) + margin
    stop = canvas.width - margin - int(draw.textlength(high, font)) - margin
    draw.text((margin, middle), low, (235, 235, 235), font, anchor="lm")
    draw.text((canvas.width - margin, middle), high, (235, 235, 235), font, anchor="rm")
    if stop > start:
        strip = np.broadcast_to(heat_colours(np.linspace(0, 1, stop - start)), (height // 3, stop - start, 3))
        canvas.paste(Image.fromarray(np.ascontiguousarray(strip)), (start, middle - height // 6))
