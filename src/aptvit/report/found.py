"""What a detector or a segmenter found in a photo, drawn, with the patches beside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from aptvit.dense.inference import Prediction
from aptvit.report.drawing import draw_patches, side_by_side
from aptvit.report.overlays import draw_boxes, draw_classes

__all__ = ["draw_found"]


def draw_found(photo: Image.Image, found: Prediction, classes: Sequence[str]) -> Image.Image:
    """The photo with its boxes or classes of pixels, and beside it the patches, padding left out.

    Args:
        photo: The photo.
        found: From `aptvit.dense.inference.predict_image`.
        classes: Names of the classes.
    """
    pixels = np.asarray(photo)
    if found.classes is None:
        names = [f"{classes[label]} {score:.0%}" for label, score in zip(found.labels, found.scores, strict=True)]
        drawn = draw_boxes(pixels, found.boxes, found.labels, names, found.masks)
    else:
        drawn = draw_classes(pixels, found.classes, classes)
    patches = found.patches
    beside = draw_patches(patches.pixels, patches.patches, patches.patch_size)
    zoom = beside.width // patches.pixels.shape[1]
    height, width = patches.content
    beside = beside.crop((0, 0, width * zoom, height * zoom))
    beside = beside.resize((drawn.width, round(drawn.width * photo.height / photo.width)))
    return side_by_side([drawn, beside])
