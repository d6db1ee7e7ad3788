"""Predictions of detectors and segmenters for single images, with the patches of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.transforms.v2.functional import pil_to_tensor

from aptvit.dense.content import content_keep_ratio
from aptvit.dense.large import ObjectMask, are_fragments, classes_at, masks_of, reduce_to, tiles
from aptvit.dense.saved import DenseModel
from aptvit.dense.transforms import fit
from aptvit.measuring.progress import Progress, silent

__all__ = ["ImagePatches", "Prediction", "predict_image", "resize_options", "run_network"]


@dataclass(frozen=True)
class ImagePatches:
    """The patches of an image.

    Attributes:
        pixels: (H, W, 3) uint8 image as the network reads it, padding included.
        patches: (n, 3) rows (y, x, size) in pixels, which tile ``pixels``.
        patch_size: Side of a base patch in pixels.
        content: Height and width in pixels without padding.
    """

    pixels: np.ndarray
    patches: np.ndarray
    patch_size: int
    content: tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """Predictions for an image.

    Attributes:
        boxes: (n, 4) corners x1, y1, x2, y2 in pixels of the image; n is 0 for segmenters.
        labels: (n,) classes of the boxes, from 0.
        scores: (n,) scores of the boxes, from 0 to 1.
        masks: Masks of the objects; None without masks.
        classes: (H, W) class of each pixel; None for detectors.
        tokens: Patch tokens of the image, without padding.
        tokens_read: Patch tokens that go through the blocks in all passes.
        uniform_tokens: Patch tokens of the uniform model.
        read_size: (height, width) that the network reads the image at, or its largest tile; in pixels, without padding.
        num_tiles: Number of tiles; 1 without tiles. Tokens are those of all tiles.
        patches: The patches of the image; None with tiles, which overlap.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: tuple[ObjectMask, ...] | None
    classes: np.ndarray | None
    tokens: int
    tokens_read: int
    uniform_tokens: int
    read_size: tuple[int, int]
    num_tiles: int
    patches: ImagePatches | None


def run_network(dense: DenseModel, image: Image.Image) -> dict[str, Tensor] | Tensor:
    """Run the network on an upright RGB image.

    Args:
        dense: The detector or segmenter.
        image: The image.

    Returns:
        torchvision's ``boxes``, ``labels`` (from 1), ``scores`` and ``masks``; or (classes, H, W) probabilities.
    """
    if dense.task == "detection":
        return _detections(dense, image)
    size = (image.height, image.width)
    return F.interpolate(_probabilities(dense, image)[None], size=size, mode="bilinear", align_corners=False)[0]


@torch.inference_mode()
def predict_image(
    dense: DenseModel,
    image: Image.Image,
    min_score: float = 0.5,
    max_side: int | None = None,
    tile: int | None = None,
    progress: Progress = silent,
) -> Prediction:
    """Predict boxes, or the class of each pixel, for an upright RGB image.

    Args:
        dense: From `aptvit.dense.from_pretrained`.
        image: The image.
        min_score: Least score of boxes that are kept.
        max_side: A larger image is reduced to this longer side in pixels before it is read. By default it is not.
        tile: A larger image is read in square tiles of this side in pixels, which overlap by a quarter. A pixel has the
            class that the tile with the nearest middle says; of boxes of a class that overlap by more than half, the
            one with the highest score is kept, and boxes that a tile cut off give way to larger ones.
        progress: Wraps the tiles, or the crops of a segmenter.

    Raises:
        ValueError: If both ``max_side`` and ``tile`` are given, or one is too small.
    """
    if max_side is not None and tile is not None:
        raise ValueError(f"max_side={max_side} and tile={tile}: give one, tiles are read at the image's own size")
    if (max_side or tile or 32) < 32:
        raise ValueError(f"{f'max_side={max_side}' if max_side else f'tile={tile}'}: give 32 pixels or more")
    if tile is not None and max(image.size) > tile:
        return _predict_tiles(dense, image, min_score, tile, progress)
    return _predict(dense, reduce_to(image, max_side), (image.height, image.width), min_score, progress)


def _predict(
    dense: DenseModel, image: Image.Image, size: tuple[int, int], min_score: float, progress: Progress = silent
) -> Prediction:
    """The prediction for a whole image, with boxes, masks and classes at (height, width) pixels."""
    boxes, labels, scores = np.zeros((0, 4)), np.zeros(0, dtype=int), np.zeros(0)
    masks, classes = None, None
    if dense.task == "detection":
        outputs = _detections(dense, image)
        selected = outputs["scores"] >= min_score
        boxes, scores = (outputs[name][selected].float().cpu().numpy() for name in ("boxes", "scores"))
        boxes = boxes * np.tile([size[1] / image.width, size[0] / image.height], 2)
        labels = outputs["labels"][selected].cpu().numpy() - 1
        masks = masks_of(outputs["masks"][selected], size) if "masks" in outputs else None
    else:
        classes = classes_at(_probabilities(dense, image, progress), size)
    tokens, patches = _patches(dense, image)
    return Prediction(boxes, labels, scores, masks, classes, *tokens, patches.content, 1, patches)


def _predict_tiles(
    dense: DenseModel, image: Image.Image, min_score: float, side: int, progress: Progress
) -> Prediction:
    size, windows, parts = (image.height, image.width), tiles((image.height, image.width), side), []
    classes = None
    for (rows, cols), inner in progress(windows, "tiles", len(windows)):
        pixels = image.crop((cols.start, rows.start, cols.stop, rows.stop))
        part = _predict(dense, pixels, (pixels.height, pixels.width), min_score)
        if part.classes is not None:
            classes = np.zeros(size, dtype=part.classes.dtype) if classes is None else classes
            top, left = rows.start, cols.start
            classes[inner] = part.classes[
                inner[0].start - top : inner[0].stop - top, inner[1].start - left : inner[1].stop - left
            ]
        parts.append(part)
    return _joined(parts, [window for window, _ in windows], size, classes)


def _joined(
    parts: Sequence[Prediction],
    windows: Sequence[tuple[slice, slice]],
    size: tuple[int, int],
    classes: np.ndarray | None,
) -> Prediction:
    """The boxes and masks of all tiles in an image of (height, width) pixels, without duplicates."""
    boxes = np.concatenate(
        [part.boxes + np.tile([cols.start, rows.start], 2) for part, (rows, cols) in zip(parts, windows, strict=True)]
    )
    labels, scores = (np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "scores"))
    source = [(i, k) for i, part in enumerate(parts) for k in range(len(part.boxes))]
    kept = batched_nms(*map(torch.from_numpy, (boxes, scores.astype(boxes.dtype), labels)), 0.5).numpy()
    kept = kept[~are_fragments(boxes[kept], labels[kept], [windows[source[index][0]] for index in kept], size)]
    masks = None
    if any(part.masks is not None for part in parts):
        masks = tuple(_moved(parts[part].masks, k, windows[part], size) for part, k in (source[i] for i in kept))
    return Prediction(
        boxes[kept],
        labels[kept],
        scores[kept],
        masks,
        classes,
        tokens=sum(part.tokens for part in parts),
        tokens_read=sum(part.tokens_read for part in parts),
        uniform_tokens=sum(part.uniform_tokens for part in parts),
        read_size=max(part.read_size for part in parts),
        num_tiles=len(parts),
        patches=None,
    )


def _moved(
    masks: Sequence[ObjectMask] | None, number: int, window: tuple[slice, slice], size: tuple[int, int]
) -> ObjectMask:
    """A mask of a tile as a mask of the image."""
    assert masks is not None  # as of all tiles
    rows, cols = window
    return replace(masks[number], place=(cols.start, rows.start, cols.stop, rows.stop), size=size)


def _detections(dense: DenseModel, image: Image.Image) -> dict[str, Tensor]:
    detections: dict[str, Tensor] = dense.network([_unit(dense, image)])[0]
    return detections


def _probabilities(dense: DenseModel, image: Image.Image, progress: Progress = silent) -> Tensor:
    """(classes, h, w) probabilities at the size that a segmenter reads the image at."""
    inference = dense.inference
    predict = partial(dense.network.predict, mode="slide" if inference["slide"] else "whole", crop=inference["crop"])
    probabilities: Tensor = predict(_for_segmenter(dense, image), progress=progress)
    return probabilities


def _unit(dense: DenseModel, image: Image.Image) -> Tensor:
    return pil_to_tensor(image).to(_device(dense)).float() / 255


def _device(dense: DenseModel) -> torch.device:
    device: torch.device = next(dense.network.parameters()).device
    return device


def resize_options(dense: DenseModel) -> tuple[int, float]:
    """The arguments ``longer_side`` and ``shrink`` of `aptvit.dense.transforms.fit` for a segmenter."""
    return dense.inference["longer_side"], dense.inference.get("shrink", 1.0)


def _for_segmenter(dense: DenseModel, image: Image.Image) -> Tensor:
    """(C, H, W) normalised image, at the size of evaluation."""
    pixels = fit(pil_to_tensor(image), *resize_options(dense))
    normalised: Tensor = dense.model.patchifier.normalization.normalised(pixels[None].to(_device(dense)))
    return normalised[0]


def _patches(dense: DenseModel, image: Image.Image) -> tuple[tuple[int, int, int], ImagePatches]:
    """The three numbers of tokens of a `Prediction`, without padding, and the patches."""
    model = dense.model
    if dense.task == "detection":
        images, _ = dense.network.transform([_unit(dense, image)])
        x, (height, width) = images.tensors, images.image_sizes[0]
    else:
        normalised = _for_segmenter(dense, image)
        height, width = normalised.shape[1:]
        multiple = model.patch_size * (model.window_size or 1)
        x = F.pad(normalised, (0, -width % multiple, 0, -height % multiple))[None]
    layout = model.layout(x)
    uniform_tokens = -(-height // layout.patch_size) * -(-width // layout.patch_size)
    tokens = round(content_keep_ratio(layout, [(height, width)]) * uniform_tokens)
    num_read_twice = round((layout.read_ratio - layout.keep_ratio) * layout.scale_map[0].numel())
    pixels = model.patchifier.normalization.pixels(x)[0].round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    patches = ImagePatches(pixels, layout.patches(0).cpu().numpy(), layout.patch_size, (height, width))
    return (tokens, tokens + num_read_twice, uniform_tokens), patches
