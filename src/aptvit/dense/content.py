"""Padding is not a saving: what was cut from the pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.layout import PatchLayout
from aptvit.patching.scoring import EncodingScorer

__all__ = ["KeptTokens", "content_keep_ratio"]


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


class KeptTokens:
    """Means of the share of the tokens that models keep, over many pictures.

    Args:
        model: The adaptive model.
        device: Where they are kept.

    Attributes:
        means: ``kept`` of all, ``kept_content`` without padding and, of a model that reads twice, ``read``.
    """

    def __init__(self, model: AdaptivePatchTransformer, device: torch.device) -> None:
        try:
            from torchmetrics import MeanMetric
        except ImportError:
            raise ImportError("training needs torchmetrics: pip install 'aptvit[train]'") from None
        names = ["kept", "kept_content", *(["read"] if isinstance(model.patchifier.scorer, EncodingScorer) else [])]
        self.means: dict[str, Any] = {name: MeanMetric().to(device) for name in names}

    def add(self, layout: PatchLayout, sizes: Sequence[tuple[int, int]], weight: float, content_weight: float) -> None:
        """Arguments as for `content_keep_ratio`, and what the layout and its content weigh."""
        self.means["kept"].update(layout.keep_ratio, weight=weight)
        self.means["kept_content"].update(content_keep_ratio(layout, sizes), weight=content_weight)
        if "read" in self.means:
            self.means["read"].update(layout.read_ratio, weight=weight)
