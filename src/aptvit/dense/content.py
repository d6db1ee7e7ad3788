"""Padding is not a saving: what was cut from the pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aptvit.layout import PatchLayout

__all__ = ["content_keep_ratio"]


def content_keep_ratio(layout: PatchLayout, sizes: Sequence[tuple[int, int]]) -> float:
    """Patch tokens kept / patch tokens of the uniform grid, of what lies in the pictures and not in their padding.

    Pictures start at the top left corner; what is beyond ``sizes`` was filled up. A patch counts if any of it is
    picture. ``layout.keep_ratio`` counts padding as well, which is smooth and merges.

    Args:
        layout: Of the padded images.
        sizes: (height, width) in pixels of each picture before padding.

    Raises:
        ValueError: If there are not as many sizes as images, or one is larger than its image.
    """
    if len(sizes) != layout.num_images:
        raise ValueError(f"{len(sizes)} sizes for {layout.num_images} images: give the size of each before padding")
    rows = [-(-height // layout.patch_size) for height, _ in sizes]
    cols = [-(-width // layout.patch_size) for _, width in sizes]
    for image, (height, width) in enumerate(layout.grid_sizes):
        if rows[image] > height or cols[image] > width:
            raise ValueError(f"picture {image} of {sizes[image]} pixels is larger than its grid of {height}x{width}")
    device = layout.image.device
    inside = (layout.row < torch.tensor(rows, device=device)[layout.image]) & (
        layout.col < torch.tensor(cols, device=device)[layout.image]
    )
    return float(inside.sum()) / sum(r * c for r, c in zip(rows, cols, strict=True))
