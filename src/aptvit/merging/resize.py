"""Resizing only: adaptive patches without the sub-patch branch, the paper's second baseline."""

from __future__ import annotations

from typing import Any

from torch import nn

from aptvit.api import adapt
from aptvit.merging.settings import names_setting
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["resize"]


@names_setting
def resize(model: nn.Module, **options: Any) -> AdaptivePatchTransformer:
    """Adaptive patches that are only resized: ``aptvit.adapt(model, resize_only=True, **options)``.

    Args:
        model: As for `aptvit.adapt`.
        options: As for `aptvit.adapt`: ``thresholds=``, or ``keep=``, the share of its patch tokens that every image
            keeps, the same in every block.

    Returns:
        The adaptive model: (B, C, H, W) images, or a list of (C, H_i, W_i), to what the host returns.

    Raises:
        ValueError: As for `aptvit.adapt`.
    """
    return adapt(model, resize_only=True, **options)
