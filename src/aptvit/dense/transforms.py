"""Augmentation of images with boxes or masks by torchvision's transforms (v2), and resizing."""

from __future__ import annotations

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

__all__ = ["box_transform", "fit", "mask_transform", "with_boxes", "with_mask"]

_LARGE_SCALE_JITTER = (0.1, 2.0)  # of ViTDet and EVA-02's detectors
_SCALE_JITTER = (0.5, 2.0)  # of UperNet


def box_transform(size: int, jitter: tuple[float, float] = _LARGE_SCALE_JITTER, flip: float = 0.5) -> v2.Transform:
    """For training detectors: random scale, crop or padding to a square, flip; boxes outside are removed.

    Args:
        size: Side of the square in pixels.
        jitter: Range of scales; at 1 the longer side fits the square.
        flip: Share of flipped images.
    """
    return v2.Compose(
        [
            v2.ScaleJitter((size, size), scale_range=jitter, antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill=0),
            v2.RandomHorizontalFlip(flip),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )


def mask_transform(
    size: int,
    jitter: tuple[float, float] = _SCALE_JITTER,
    flip: float = 0.5,
    distort: float = 0.5,
    no_class: int = 255,
) -> v2.Transform:
    """For training segmenters: random scale, crop or padding to a square, flip, photometric distortion.

    Args:
        size: Side of the square in pixels.
        jitter: Range of scales; at 1 the longer side fits the square.
        flip: Share of flipped images.
        distort: Share of images with photometric distortion.
        no_class: Value in masks of pixels without a class, such as those of padding.
    """
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: no_class}
    return v2.Compose(
        [
            v2.ScaleJitter((size, size), scale_range=jitter, antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(flip),
            v2.RandomPhotometricDistort(p=distort),
        ]
    )


def with_boxes(
    image: Tensor, boxes: Tensor, labels: Tensor, masks: Tensor | None = None
) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
    """An image and its boxes as inputs of torchvision's transforms.

    Args:
        image: (3, H, W) uint8.
        boxes: (n, 4) corners in pixels.
        labels: (n,) classes.
        masks: (n, H, W), if there are any.
    """
    size = (image.shape[1], image.shape[2])
    corners = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)
    target = {"boxes": corners, "labels": labels}
    if masks is not None:
        target["masks"] = tv_tensors.Mask(masks)
    return tv_tensors.Image(image), target


def with_mask(image: Tensor, mask: Tensor) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """A (3, H, W) uint8 image and its (H, W) classes as inputs of torchvision's transforms."""
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def fit(image: Tensor, longer_side: int, shrink: float = 1.0) -> Tensor:
    """Resize an image.

    Args:
        image: (C, H, W).
        longer_side: Longer side in pixels; 0 for that of the image.
        shrink: Further factor of the sides.

    Returns:
        (C, H', W').
    """
    if not longer_side and shrink == 1:
        return image
    longest = max(image.shape[1:])
    scale = round((longer_side or longest) * shrink) / longest
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    resized: Tensor = resize(image, size, antialias=True)
    return resized
