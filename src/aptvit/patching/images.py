"""Input images: one batch, or a list of images of any sizes, checked and grouped by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ImageGroup", "Images", "Normalization", "group_by_size"]

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

    def grid_size(self, patch_size: int) -> tuple[int, int]:
        """(rows, columns) of base patches of each image."""
        return self.images.shape[2] // patch_size, self.images.shape[3] // patch_size


@dataclass(frozen=True)
class Normalization:
    """How float images were normalised: (pixel / 255 - mean) / std.

    Attributes:
        mean: (C,) of pixels in [0, 1].
        std: (C,) of pixels in [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_channels(cls, mean: Sequence[float], std: Sequence[float], channels: int) -> Normalization:
        """From one value for all channels, or one for each channel.

        Raises:
            ValueError: If the number of values is neither 1 nor the number of channels, or they are not of pixels in
                [0, 1].
        """
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name}={values} has {len(values)} values for {channels} channels: give one for each")
            if max(values) > 1:
                raise ValueError(f"{name}={values} is on the scale of 0 to 255: give it divided by 255")
        return cls(*(tuple(map(float, values)) * (channels // len(values)) for values in (mean, std)))

    def pixels(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images before normalisation: float32 in 0..255. Raw uint8 images keep their values."""
        if images.dtype == torch.uint8:
            return images.float()
        mean, std = self.statistics(images.device)
        return torch.addcmul(mean * 255, images.float(), std * 255)

    def normalised(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images as a model reads them: float images unchanged, raw uint8 images normalised."""
        if images.dtype != torch.uint8:
            return images
        mean, std = self.statistics(images.device)
        return (images.float() / 255 - mean) / std

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(1, C, 1, 1) mean and standard deviation."""
        mean, std = torch.tensor([self.mean, self.std])[:, None, :, None, None].to(device, non_blocking=True)
        return mean, std


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
        unit: Name of what is ``multiple`` pixels wide, for the error message.

    Returns:
        The images of each size and type, with their numbers in the batch.

    Raises:
        ValueError: If a list is empty, or an image has a wrong shape or type.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4:
            raise ValueError(f"images of shape {tuple(images.shape)} are not a batch (B, {channels}, H, W)")
        checked = _checked(images, channels, multiple, pad, cut_size, unit, "images")
        return [ImageGroup(checked, list(range(len(images))))]
    if len(images) == 0:
        raise ValueError("an empty list has no size: give at least one image, or a tensor (0, C, H, W)")
    groups: dict[Any, list[tuple[int, Tensor]]] = {}
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image {i} is {got}: a list holds tensors of shape ({channels}, H, W)")
        image = _checked(image, channels, multiple, pad, cut_size, unit, f"image {i}")
        groups.setdefault((image.shape, image.dtype), []).append((i, image))  # raw and normalised pixels stay apart
    return [
        ImageGroup(torch.stack([image for _, image in members]), [i for i, _ in members]) for members in groups.values()
    ]


def _checked(
    images: Tensor, channels: int, multiple: int, pad: bool, cut_size: tuple[int, int] | None, unit: str, name: str
) -> Tensor:
    """(..., C, H, W) -> the same, padded or cut to whole patches."""
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
    sizes = " or ".join(f"{h}x{w}" for h, w in (smaller, larger) if h and w)
    raise ValueError(
        f"{name} of {height}x{width} pixels: sides must be multiples of the {unit} size {multiple}. "
        f"Resize to {sizes}, or adapt the model with pad=True"
    )
