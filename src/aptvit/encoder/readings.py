"""Other ways to read a coarse patch than Eq. 2 of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from aptvit.patching.layout import PatchLayout

__all__ = ["Reading", "read_at_corner"]

Reading = Literal["resized", "corner"]


def read_at_corner(layout: PatchLayout) -> PatchLayout:
    """Replace each coarse patch by the base patch in its lower right corner, for the embedding.

    The other base patches inside are not read: smooth regions are sampled, and every token is one that the host knows.

    Args:
        layout: The layout of the images.

    Returns:
        A layout of the same tokens, all of them base patches.
    """
    offset = (torch.ones_like(layout.scale) << layout.scale) - 1
    counts = [[sum(of_image)] for of_image in layout.counts]
    row, col, scale = layout.row + offset, layout.col + offset, torch.zeros_like(layout.scale)
    return replace(layout, num_scales=1, counts=counts, row=row, col=col, scale=scale)
