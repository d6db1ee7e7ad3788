"""Downscale: fewer tokens by smaller images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.format import Format
from torch import Tensor, nn

from aptvit.merging.blocks import at_least_float32
from aptvit.merging.reduced import HostView, check_host
from aptvit.merging.settings import exclusive_setting, names_setting, setting_of_share

__all__ = ["DownscaledTransformer", "downscale"]


@names_setting
def downscale(
    model: nn.Module, size: int | tuple[int, int] | None = None, *, keep: float | None = None
) -> DownscaledTransformer:
    """Run a model on images that are resized to ``size``, with its positions resampled to the smaller grid.

    Args:
        model: A timm VisionTransformer or DeiT. Its parameters are shared, and it is not changed.
        size: Side of the smaller images in pixels, or (height, width).
        keep: Instead of the size: the share of the patch tokens of the model's own image size, the same in every block.
            The nearest size of the same proportions in whole patches is taken.

    Returns:
        The model, from (B, C, H, W) images of the original size to (B, num_classes) logits.

    Raises:
        ValueError: If the size is not a multiple of the patch size, or the model is of another class.
    """
    if (chosen := exclusive_setting("size", size, keep)) is None:
        assert keep is not None
        embed, prefix = check_host(model).patch_embed, check_host(model).num_prefix_tokens
        (rows, cols), patch = embed.grid_size, embed.patch_size
        longest = max(rows, cols)
        grids = [tuple(max(1, round(side * n / longest)) for side in (rows, cols)) for n in range(longest, 0, -1)]
        grid = setting_of_share("downscale", grids, lambda grid: [prefix + math.prod(grid)], keep, rows * cols, prefix)
        chosen = (grid[0] * patch[0], grid[1] * patch[1])
    return DownscaledTransformer(model, chosen)


class DownscaledTransformer(HostView):
    """A host on resized images; see `downscale`.

    Args:
        host: A timm VisionTransformer or VisionTransformerDistilled.
        size: Side in pixels, or (height, width).

    Raises:
        ValueError: If the size is not a multiple of the patch size, or the model is of another class.
    """

    def __init__(self, host: nn.Module, size: int | Sequence[int]) -> None:
        super().__init__(host)
        embed = self.vit.patch_embed
        if not isinstance(embed, PatchEmbed):
            raise ValueError(
                f"this model's patches are made by {type(embed).__name__}: only timm's PatchEmbed takes other sizes"
            )
        height, width = size if isinstance(size, Sequence) else (size, size)
        sides = zip((height, width), embed.patch_size, strict=True)
        if not all(isinstance(side, Integral) and side > 0 and side % patch == 0 for side, patch in sides):
            raise ValueError(
                f"size={size!r} is not made of whole patches: give multiples of {embed.patch_size[0]} (height) and "
                f"{embed.patch_size[1]} (width)"
            )
        self.size = (height, width)
        # timm's own option for other sizes. It resamples in each forward, so positions are still the host's parameter.
        self.vit.dynamic_img_size = True
        embed.strict_img_size = False
        embed.flatten = False
        embed.output_fmt = Format.NHWC

    def tokens_per_block(self, grid_size: tuple[int, int] | None = None) -> list[int]:
        """Tokens that enter each block, prefix tokens included; the same for all images."""
        patch = self.vit.patch_embed.patch_size
        return super().tokens_per_block((self.size[0] // patch[0], self.size[1] // patch[1]))

    def _check(self, images: Tensor) -> None:
        self._check_batch(images)  # of any size

    def _embed(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != self.size:
            resized = F.interpolate(
                images.to(at_least_float32(images.dtype)), self.size, mode="bicubic", antialias=True
            )
            images = resized.to(images.dtype)
        return super()._embed(images)
