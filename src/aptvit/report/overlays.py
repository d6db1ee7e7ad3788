"""Boxes and pixel classes, drawn on images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_boxes", "draw_classes"]

_MIN_SIDE = 768
_DARK = (27, 28, 32)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str], masks: Iterable[np.ndarray] = ()
) -> Image.Image:
    """Draw boxes with names over an image, a colour for each class.

    Args:
        image: (H, W, 3) uint8.
        boxes: (n, 4) corners x1, y1, x2, y2 in pixels.
        labels: (n,) class indices.
        names: Text at each box.
        masks: (H, W) bool for each box, the pixels of the object, which are tinted; or none.

    Returns:
        The drawing, enlarged so that the longer side is at least 768 pixels.
    """
    tinted = Image.fromarray(image)
    for mask, label in zip(masks, labels, strict=False):
        tinted.paste(_colour(int(label)), (0, 0, *tinted.size), Image.fromarray(mask.astype(np.uint8) * 128))
    canvas, zoom = _enlarged(tinted)
    draw = ImageDraw.Draw(canvas)
    line = max(2, max(canvas.size) // 400)
    font = ImageFont.load_default(max(14, max(canvas.size) // 60))
    for box, label, name in zip(boxes, labels, names, strict=True):
        colour = _colour(int(label))
        left, top, right, bottom = (float(corner) * zoom for corner in box)
        draw.rectangle((left, top, right, bottom), outline=colour, width=line)
        _, _, width, height = draw.textbbox((0, 0), name, font=font)
        x = min(max(left, 0), canvas.width - width - 4)
        y = top - height - 4 if top >= height + 4 else top
        draw.rectangle((x, y, x + width + 4, y + height + 4), fill=colour)
        draw.text((x + 2, y + 1), name, fill=_DARK, font=font)
    return canvas


def draw_classes(image: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Tint each pixel of an image by its class, with a legend of the classes in the image below.

    Args:
        image: (H, W, 3) uint8.
        classes: (H, W) class indices.
        names: Names of the classes.

    Returns:
        The drawing, enlarged as `draw_boxes` does it, and taller by the legend.
    """
    canvas, _ = _enlarged(Image.fromarray(image))
    palette = np.array([_colour(number) for number in range(len(names))], dtype=np.uint8)
    tint = Image.fromarray(palette[classes]).resize(canvas.size, Image.Resampling.NEAREST)
    canvas = Image.blend(canvas, tint, 0.55)
    return _with_legend(canvas, [(names[i], _colour(int(i))) for i in np.unique(classes)])


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """An image enlarged to a longer side of at least `_MIN_SIDE` pixels, and the factor."""
    zoom = math.ceil(max(1.0, _MIN_SIDE / max(image.size)))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC), zoom


def _with_legend(canvas: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    font = ImageFont.load_default(18)
    draw = ImageDraw.Draw(canvas)
    places, x, row = [], 12, 0
    for name, colour in entries:
        width = 26 + int(draw.textlength(name, font)) + 18
        if x + width > canvas.width and x > 12:
            x, row = 12, row + 1
        places.append((x, row, name, colour))
        x += width
    taller = Image.new("RGB", (canvas.width, canvas.height + 12 + 28 * (row + 1)), _DARK)
    taller.paste(canvas)
    draw = ImageDraw.Draw(taller)
    for x, row, name, colour in places:
        y = canvas.height + 10 + 28 * row
        draw.rectangle((x, y, x + 18, y + 18), fill=colour)
        draw.text((x + 26, y - 2), name, fill=(235, 235, 235), font=font)
    return taller


def _colour(number: int) -> tuple[int, int, int]:
    """RGB colour of a class. Hues are a golden angle apart, so that consecutive classes always differ."""
    red, green, blue = colorsys.hsv_to_rgb(
        number * 0.618034 % 1, 0.65 if number % 2 else 0.85, 1.0 if number % 3 else 0.8
    )
    return round(255 * red), round(255 * green), round(255 * blue)
