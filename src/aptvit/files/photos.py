"""Photos as a model sees them: read from files, resized and cropped, in normalised batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from aptvit.files.images import open_image, read_each
from aptvit.measuring.progress import Progress, silent

__all__ = ["NormalisedBatches", "Photos", "read_photos"]


@dataclass(frozen=True)
class Photos:
    """Photos as the model sees them.

    Attributes:
        pixels: (C, H, W) uint8 for each photo.
        paths: Their files.
        skipped: Why other files are not here.
    """

    pixels: list[Tensor]
    paths: list[Path]
    skipped: list[str]


def read_photos(paths: Sequence[Path], data: dict[str, Any], progress: Progress = silent) -> Photos:
    """Read photos through timm's own evaluation transform (resize, centre crop), up to normalisation.

    A file that cannot be read is reported and the rest goes on.

    Args:
        paths: Image files.
        data: timm's data configuration of the model.
        progress: Wraps the files.

    Raises:
        ValueError: If no file can be read.
    """
    transform = create_transform(**data, is_training=False, use_prefetcher=True)  # uint8, not normalised
    found, skipped = read_each(paths, lambda path: torch.as_tensor(transform(open_image(path))), progress)
    return Photos([pixels for _, pixels in found], [path for path, _ in found], skipped)


class NormalisedBatches:
    """Normalised batches of photos; can be iterated again and again.

    Args:
        pixels: (C, H, W) uint8 for each photo, of one size.
        data: timm's data configuration of the model: its mean and std are read.
        batch_size: Photos per batch; the last one may hold fewer.
        device: Where the batches are to be.
    """

    def __init__(self, pixels: Sequence[Tensor], data: dict[str, Any], batch_size: int, device: str) -> None:
        self.pixels, self.batch_size, self.device = pixels, batch_size, device
        self.mean = torch.tensor(data["mean"]).view(1, -1, 1, 1).to(device)
        self.std = torch.tensor(data["std"]).view(1, -1, 1, 1).to(device)

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.pixels), self.batch_size):
            batch = torch.stack(list(self.pixels[start : start + self.batch_size])).to(self.device)
            yield (batch.float() / 255 - self.mean) / self.std
