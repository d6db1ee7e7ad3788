"""Predictions of detectors and segmenters for single images, with the patches of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from aptvit.dense.content import content_keep_ratio
from aptvit.dense.saved import DenseModel
from aptvit.dense.transforms import fit

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
        masks: (n, H, W) bool masks of the objects; None without masks.
        classes: (H, W) class of each pixel; None for detectors.
        tokens: Patch tokens of the image, without padding.
        tokens_read: Patch tokens that go through the blocks in all passes.
        uniform_tokens: Patch tokens of the uniform model.
        patches: The patches of the image.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None
    classes: np.ndarray | None
    tokens: int
    tokens_read: int
    uniform_tokens: int
    patches: ImagePatches


def run_network(dense: DenseModel, image: Image.Image) -> dict[str, Tensor] | Tensor:
    """Run the network on an upright RGB image.

    Args:
        dense: The detector or segmenter.
        image: The image.

    Returns:
        torchvision's ``boxes``, ``labels`` (from 1), ``scores`` and ``masks``; or (classes, H, W) probabilities.
    """
    if dense.task == "detection":
        detections: dict[str, Tensor] = dense.network([_unit(dense, image)])[0]
        return detections
    x, inference = _for_segmenter(dense, image), dense.inference
    probabilities = dense.network.predict(x, "slide" if inference["slide"] else "whole", inference["crop"])
    size = (image.height, image.width)
    return F.interpolate(probabilities[None], size=size, mode="bilinear", align_corners=False)[0]


@torch.inference_mode()
def predict_image(dense: DenseModel, image: Image.Image, min_score: float = 0.5) -> Prediction:
    """Predict boxes, or the class of each pixel, for an upright RGB image.

    Args:
        dense: From `aptvit.dense.from_pretrained`.
        image: The image.
        min_score: Least score of boxes that are kept.
    """
    outputs = run_network(dense, image)
    tokens, patches = _patches(dense, image)
    if isinstance(outputs, dict):
        selected = outputs["scores"] >= min_score
        boxes, scores = (outputs[name][selected].float().cpu().numpy() for name in ("boxes", "scores"))
        labels, classes = outputs["labels"][selected].cpu().numpy() - 1, None
        masks = outputs["masks"][selected][:, 0].cpu().numpy() >= 0.5 if "masks" in outputs else None
    else:
        boxes, labels, scores = np.zeros((0, 4)), np.zeros(0, dtype=int), np.zeros(0)
        masks, classes = None, outputs.argmax(0).cpu().numpy()
    return Prediction(boxes, labels, scores, masks, classes, *tokens, patches)


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
