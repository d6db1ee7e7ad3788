"""The share of tokens kept inside images, without their padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.layout import PatchLayout
from aptvit.patching.scoring import EncodingScorer

__all__ = ["KeptTokens", "content_keep_ratio"]


def content_keep_ratio(layout: PatchLayout, sizes: Sequence[tuple[int, int]]) -> float:
    """Patch tokens kept / patch tokens of the uniform grid, without patches of padding.

    Images start at the top left corner of the padded images. A patch counts if a part of it is inside the image.
    ``layout.keep_ratio`` also counts padding, which is smooth and therefore merged.

    Args:
        layout: The layout of the padded images.
        sizes: (height, width) in pixels of each image before padding.

    Raises:
        ValueError: If the number of sizes is not that of images, or a size is larger than its padded image.
    """
    if len(sizes) != layout.num_images:
        raise ValueError(f"{len(sizes)} sizes for {layout.num_images} images: give the size of each before padding")
    rows = [-(-height // layout.patch_size) for height, _ in sizes]
    cols = [-(-width // layout.patch_size) for _, width in sizes]
    for image, (height, width) in enumerate(layout.grid_sizes):
        if rows[image] > height or cols[image] > width:
            raise ValueError(f"image {image} of {sizes[image]} pixels is larger than its grid of {height}x{width}")
    device = layout.image.device
    inside = (layout.row < torch.tensor(rows, device=device)[layout.image]) & (
        layout.col < torch.tensor(cols, device=device)[layout.image]
    )
    return float(inside.sum()) / sum(r * c for r, c in zip(rows, cols, strict=True))


class KeptTokens:
    """Mean shares of the tokens that a model keeps, over many images.

    Args:
        model: The adaptive model.
        device: Device of the means.

    Attributes:
        means: ``kept`` with padding, ``kept_content`` without padding and, with a scorer that runs the blocks, ``read``
            (`PatchLayout.read_ratio`).
    """

    def __init__(self, model: AdaptivePatchTransformer, device: torch.device) -> None:
        try:
            from torchmetrics import MeanMetric
        except ImportError:
            raise ImportError("training needs torchmetrics: pip install 'aptvit[train]'") from None
        names = ["kept", "kept_content", *(["read"] if isinstance(model.patchifier.scorer, EncodingScorer) else [])]
        self.means: dict[str, Any] = {name: MeanMetric().to(device) for name in names}

    def add(self, layout: PatchLayout, sizes: Sequence[tuple[int, int]], weight: float, content_weight: float) -> None:
        """Add a batch.

        Args:
            layout: As for `content_keep_ratio`.
            sizes: As for `content_keep_ratio`.
            weight: Weight of the batch in ``kept`` and ``read``.
            content_weight: Weight of the batch in ``kept_content``.
        """
        self.means["kept"].update(layout.keep_ratio, weight=weight)
        self.means["kept_content"].update(content_keep_ratio(layout, sizes), weight=content_weight)
        if "read" in self.means:
            self.means["read"].update(layout.read_ratio, weight=weight)
