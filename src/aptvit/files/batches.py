"""Images as a model reads them: read from files, resized and cropped, in normalised batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from aptvit.files.images import open_image, read_each
from aptvit.measuring.progress import Progress, silent

__all__ = ["LoadedImages", "NormalisedBatches", "read_images"]


@dataclass(frozen=True)
class LoadedImages:
    """Images read from files.

    Attributes:
        pixels: (C, H, W) uint8 of each image.
        paths: File of each image.
        skipped: Error messages of files that could not be read.
    """

    pixels: list[Tensor]
    paths: list[Path]
    skipped: list[str]


def read_images(
    paths: Sequence[Path],
    data: dict[str, Any],
    progress: Progress = silent,
    side: int | None = None,
    transform: Callable[[Image.Image], Any] | None = None,
) -> LoadedImages:
    """Read images through timm's evaluation transform (resize, centre crop), without normalisation.

    Files that cannot be read are skipped and reported.

    Args:
        paths: Image files.
        data: timm's data configuration of the model.
        progress: Wraps the files.
        side: Side of the images in pixels, instead of the configuration's.
        transform: A model's own transform of an upright image to (C, H, W) uint8, instead of timm's.

    Raises:
        ValueError: If no file can be read.
    """
    if side is not None:
        data = {**data, "input_size": (data["input_size"][0], side, side)}
    transform = transform or create_transform(**data, is_training=False, use_prefetcher=True)  # uint8, not normalised
    images, skipped = read_each(paths, lambda path: torch.as_tensor(transform(open_image(path))), progress)
    return LoadedImages([pixels for _, pixels in images], [path for path, _ in images], skipped)


class NormalisedBatches:
    """Normalised (B, C, H, W) float batches of images; can be iterated repeatedly.

    Args:
        pixels: (C, H, W) uint8 of each image.
        data: timm's data configuration of the model: its mean and std are used.
        batch_size: Images per batch; the last batch may hold fewer, and one before an image of another size.
        device: Device of the batches.

    Attributes:
        ranges: Numbers of the images of each batch.
    """

    def __init__(self, pixels: Sequence[Tensor], data: dict[str, Any], batch_size: int, device: str) -> None:
        self.pixels, self.batch_size, self.device = pixels, batch_size, device
        self.mean = torch.tensor(data["mean"]).view(1, -1, 1, 1).to(device)
        self.std = torch.tensor(data["std"]).view(1, -1, 1, 1).to(device)
        self.ranges: list[range] = []
        for _, run in groupby(range(len(pixels)), lambda i: pixels[i].shape):  # consecutive images of one size
            numbers = list(run)
            self.ranges += [range(i, min(i + batch_size, numbers[-1] + 1)) for i in numbers[::batch_size]]

    def __len__(self) -> int:
        return len(self.ranges)

    def __iter__(self) -> Iterator[Tensor]:
        for numbers in self.ranges:
            batch = torch.stack([self.pixels[i] for i in numbers]).to(self.device)
            yield (batch.float() / 255 - self.mean) / self.std
