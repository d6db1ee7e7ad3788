"""The predictions of a detector or a segmenter, drawn beside the patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from aptvit.dense.inference import Prediction
from aptvit.report.drawing import draw_patches, side_by_side
from aptvit.report.overlays import draw_boxes, draw_classes

__all__ = ["draw_prediction"]


def draw_prediction(image: Image.Image, prediction: Prediction, classes: Sequence[str]) -> Image.Image:
    """Draw an image with its boxes or pixel classes, and to the right of it the patches without padding.

    Args:
        image: The image.
        prediction: From `aptvit.dense.inference.predict_image`.
        classes: Names of the classes.

    Returns:
        Both drawings in a row, of equal width; the first alone for an image that was read in tiles.
    """
    pixels = np.asarray(image)
    if prediction.classes is None:
        boxes = zip(prediction.labels, prediction.scores, strict=True)
        names = [f"{classes[label]} {score:.0%}" for label, score in boxes]
        overlay = draw_boxes(pixels, prediction.boxes, prediction.labels, names, prediction.masks)
    else:
        overlay = draw_classes(pixels, prediction.classes, classes)
    patches = prediction.patches
    if patches is None:
        return overlay
    drawing = draw_patches(patches.pixels, patches.patches, patches.patch_size)
    zoom = drawing.width // patches.pixels.shape[1]
    height, width = patches.content
    drawing = drawing.crop((0, 0, width * zoom, height * zoom))
    drawing = drawing.resize((overlay.width, round(overlay.width * image.height / image.width)))
    return side_by_side([overlay, drawing])
