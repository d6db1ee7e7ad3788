"""What a model accepts: one batch, or a list of images of any sizes, checked and grouped by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ImageGroup", "Images", "group_by_size"]

Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ImageGroup:
    """Images of one size and type.

    Attributes:
        images: (b, C, H, W) normalised pixels, or raw ones as uint8.
        index: Number of each image in the batch.
    """

    images: Tensor
    index: list[int]


def group_by_size(
    images: Images,
    channels: int,
    multiple: int,
    pad: bool = False,
    cut_size: tuple[int, int] | None = None,
    unit: str = "patch",
) -> list[ImageGroup]:
    """Check images and group them by size; a batch is one group, without a copy.

    Args:
        images: (B, C, H, W), or a list of (C, H_i, W_i).
        channels: Channels that the model reads.
        multiple: Sides must be multiples of this many pixels.
        pad: Pad at the right and bottom with zeros to such multiples, as timm's ``dynamic_img_pad`` does.
        cut_size: (H, W) of images whose incomplete patches are cut off, as a host does whose own size is not a
            multiple of its patch size (a SigLIP has 384 pixels and patches of 14).
        unit: What is so many pixels wide.

    Raises:
        ValueError: If there are no images, or one has a wrong shape or type.
    """
    if len(images) == 0:
        raise ValueError("there are no images: give at least one")
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(f"images of shape {tuple(images.shape)} are not a batch (B, {channels}, H, W)")
        return [
            ImageGroup(_checked(images, channels, multiple, pad, cut_size, unit, "images"), list(range(len(images))))
        ]
    alike: dict[Any, list[int]] = {}
    checked = []
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {i} is {got}: a list holds tensors of shape ({channels}, H, W)")
        checked.append(_checked(image, channels, multiple, pad, cut_size, unit, f"image {i}"))
        alike.setdefault((checked[-1].shape, checked[-1].dtype), []).append(i)  # raw pixels are no normalised ones
    return [ImageGroup(torch.stack([checked[i] for i in index]), index) for index in alike.values()]


def _checked(
    images: Tensor, channels: int, multiple: int, pad: bool, cut_size: tuple[int, int] | None, unit: str, name: str
) -> Tensor:
    """images: (..., C, H, W)."""
    *_, got, height, width = images.shape
    if got != channels:
        raise ValueError(f"{name} of shape {tuple(images.shape)}: {got} channels, but the model reads {channels}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"{name} of type {images.dtype}: give normalised floats, or raw pixels as uint8")
    extra = (-height % multiple, -width % multiple)
    if extra == (0, 0) and height and width:
        return images
    smaller = [height // multiple * multiple, width // multiple * multiple]
    if (height, width) == cut_size:
        return images[..., : smaller[0], : smaller[1]]
    larger = [height + extra[0], width + extra[1]]
    if pad and height and width:
        return F.pad(images, (0, extra[1], 0, extra[0]))
    near = " or ".join(f"{h}x{w}" for h, w in (smaller, larger) if h and w)
    raise ValueError(
        f"{name} of {height}x{width} pixels: sides must be multiples of the {unit} size {multiple}. "
        f"Resize to {near}, or adapt the model with pad=True"
    )
