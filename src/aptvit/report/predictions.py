"""The predictions of a detector or a segmenter, drawn beside the patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from aptvit.dense.inference import Prediction
from aptvit.dense.large import reduce_to
from aptvit.report.drawing import draw_patches, side_by_side
from aptvit.report.overlays import draw_boxes, draw_classes

__all__ = ["draw_prediction"]

_MAX_SIDE = 4096  # of a drawing, in pixels


def draw_prediction(image: Image.Image, prediction: Prediction, classes: Sequence[str]) -> Image.Image:
    """Draw an image with its boxes or pixel classes, and to the right of it the patches without padding.

    A drawing of an image with a longer side of more than 4,096 pixels is reduced to that.

    Args:
        image: The image.
        prediction: From `aptvit.dense.inference.predict_image`.
        classes: Names of the classes.

    Returns:
        Both drawings in a row, of equal width; the first alone for an image that was read in tiles.
    """
    zoom = min(1.0, _MAX_SIDE / max(image.size))
    canvas = reduce_to(image, _MAX_SIDE)
    pixels, size = np.asarray(canvas), (canvas.height, canvas.width)
    if prediction.classes is None:
        boxes = zip(prediction.labels, prediction.scores, strict=True)
        names = [f"{classes[label]} {score:.0%}" for label, score in boxes]
        masks = (mask.pixels(size) for mask in prediction.masks or ())
        overlay = draw_boxes(pixels, prediction.boxes * zoom, prediction.labels, names, masks)
    else:
        rows, cols = (
            ((np.arange(length) + 0.5) * whole / length).astype(int)
            for length, whole in zip(size, prediction.classes.shape, strict=True)
        )
        overlay = draw_classes(pixels, prediction.classes[rows][:, cols], classes)
    patches = prediction.patches
    if patches is None:
        return overlay
    drawing = draw_patches(patches.pixels, patches.patches, patches.patch_size)
    factor = drawing.width // patches.pixels.shape[1]
    height, width = patches.content
    drawing = drawing.crop((0, 0, width * factor, height * factor))
    drawing = drawing.resize((overlay.width, round(overlay.width * image.height / image.width)))
    return side_by_side([overlay, drawing])
