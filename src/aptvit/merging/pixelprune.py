"""PixelPrune: patches that equal the patch beside or above them are dropped before the blocks.

C B        X is predicted by its left neighbour A, or by B above it where C is like A and not like B: an edge
A X        between the rows. X is dropped if none of its pixels differs from the prediction by more than a tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.merging.blocks import at_least_float32
from aptvit.merging.reduced import HostView, ReducedFeatures
from aptvit.merging.settings import exclusive_setting, names_setting, num_kept_of

__all__ = ["PrunedTransformer", "pixelprune", "predict_patches", "sources_of"]


@names_setting
def pixelprune(model: nn.Module, tolerance: float | None = None, *, keep: float | None = None) -> PrunedTransformer:
    """Drop patches whose pixels are those of a neighbour. Needs no training.

    Args:
        model: A timm VisionTransformer or DeiT. Its parameters are shared, and it is not changed.
        tolerance: Largest difference of a pixel from the prediction, in levels of 0 to 255, of patches that are
            dropped; 0 by default: only copies are dropped. Images keep different numbers of tokens.
        keep: Instead of the tolerance: the share of the patch tokens that every image keeps, those that differ most.

    Returns:
        The model, from (B, C, H, W) images to (B, num_classes) logits.

    Raises:
        ValueError: If the tolerance is negative, the share is not in (0, 1], both are given, or the model is of another
            class.
    """
    return PrunedTransformer(model, exclusive_setting("tolerance", tolerance, keep, 0.0), keep)


class PrunedTransformer(HostView):
    """A host on the patches that their neighbours do not predict; see `pixelprune`.

    Args:
        host: A timm VisionTransformer or VisionTransformerDistilled.
        tolerance: Largest difference of a pixel of patches that are dropped, in levels of 0 to 255; or None.
        keep: Share of the patch tokens that every image keeps; or None.

    Raises:
        ValueError: As for `pixelprune`.
    """

    def __init__(self, host: nn.Module, tolerance: float | None, keep: float | None = None) -> None:
        super().__init__(host)
        if keep is not None and not 0 < keep <= 1:
            raise ValueError(f"keep={keep!r} must be a share of the patch tokens in (0, 1]")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance!r} must be a number of levels of 0 to 255, 0 or more")
        self.tolerance, self.keep = tolerance, keep

    def kept_patches(self, images: Tensor) -> Tensor:
        """Which patches are kept. (B, C, H, W) normalised images -> (B, h, w) bool"""
        std = torch.tensor((self.vit.pretrained_cfg or {}).get("std") or (1.0,), device=images.device)
        levels = images.to(at_least_float32(images.dtype)) * (255 * std[:, None, None])
        tolerance = 0.0 if self.tolerance is None else self.tolerance
        difference, _ = predict_patches(levels, self.vit.patch_embed.patch_size[0], tolerance)
        if self.keep is None:
            return difference > tolerance + _ROUNDING
        flat = difference.flatten(1)
        most = flat.argsort(dim=1, descending=True, stable=True)[:, : num_kept_of(self.keep, flat.shape[1])]
        return torch.zeros_like(flat, dtype=torch.bool).scatter(1, most, True).view_as(difference)

    def forward(self, images: Tensor) -> Any:
        self._check(images)
        if self.keep is not None or len(images) < 2:
            return super().forward(images)
        counts = self.kept_patches(images).flatten(1).sum(1)
        logits = None
        for count in counts.unique():  # images with as many tokens are a batch
            index = (counts == count).nonzero()[:, 0]
            part = super().forward(images[index])
            logits = part.new_empty(len(images), *part.shape[1:]) if logits is None else logits
            logits = logits.index_copy(0, index, part)
        return logits

    def forward_features(self, images: Tensor) -> ReducedFeatures:
        """As for other baselines; images must keep the same number of tokens, such as with ``keep`` or a single image.

        Raises:
            ValueError: If they do not, or do not fit the model.
        """
        return super().forward_features(images)

    def tokens_per_block(self, grid_size: tuple[int, int] | None = None) -> list[int]:
        """With ``keep``: tokens that enter each block, prefix tokens included.

        Args:
            grid_size: As for other baselines.

        Raises:
            ValueError: With a tolerance, where it depends on the image.
        """
        if self.keep is None:
            raise ValueError("with a tolerance the number of tokens depends on the image: see kept_patches(images)")
        num_prefix = self.vit.num_prefix_tokens
        num_kept = num_kept_of(self.keep, self._num_tokens(grid_size) - num_prefix)
        return [num_prefix + num_kept] * len(self.vit.blocks)

    def _embed(self, images: Tensor) -> Tensor:
        prefix, patches = super()._embed(images).tensor_split([self.vit.num_prefix_tokens], dim=1)
        kept = self.kept_patches(images).flatten(1)  # (B, N)
        counts = kept.sum(1).unique().tolist()
        if len(counts) > 1:
            raise ValueError(
                f"these images keep {counts[0]} to {counts[-1]} patches: give one image at a time, or keep=, the share "
                "that every image keeps"
            )
        return torch.cat([prefix, patches[kept].view(len(images), -1, patches.shape[2])], dim=1)


_ROUNDING = 0.01  # levels, of normalised pixels in float32


def predict_patches(images: Tensor, patch_size: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compare each patch with the neighbour that predicts it.

    Args:
        images: (B, C, H, W) in levels of 0 to 255.
        patch_size: Side of a patch in pixels.
        tolerance: Largest difference of a pixel of patches that are alike.

    Returns:
        (B, h, w) largest difference of a pixel from the prediction, infinite for the first patch; and (B, h, w) bool,
        whether the prediction is the patch above.
    """
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).transpose(3, 4)  # (B, C, h, w, p, p)
    left = F.pad((x[:, :, :, 1:] - x[:, :, :, :-1]).abs().amax((1, 4, 5)), (1, 0), value=math.inf)  # X and A
    above = F.pad((x[:, :, 1:] - x[:, :, :-1]).abs().amax((1, 4, 5)), (0, 0, 1, 0), value=math.inf)  # X and B
    # Of X at (i, j): C and A are a patch and that above in column j - 1, C and B are beside each other in row i - 1.
    along_column = F.pad(above[:, :, :-1], (1, 0), value=math.inf)  # C and A
    along_row = F.pad(left[:, :-1], (0, 0, 1, 0), value=math.inf)  # C and B
    limit = tolerance + _ROUNDING
    from_above = (along_column <= limit) & (along_row > limit)
    from_above[:, :, 0], from_above[:, 0] = True, False
    return torch.where(from_above, above, left), from_above


def sources_of(kept: Tensor, from_above: Tensor) -> Tensor:
    """The kept patch that stands for each patch: itself, or that of its prediction.

    Args:
        kept: (B, h, w) bool.
        from_above: (B, h, w) bool, whether the prediction is the patch above, otherwise it is the patch on the left.

    Returns:
        (B, h w) number of a patch in raster order. The first patch counts as kept.
    """
    columns = kept.shape[2]
    number = torch.arange(kept[0].numel(), device=kept.device).expand(len(kept), -1)
    step = torch.where(kept, 0, torch.where(from_above, columns, 1)).flatten(1)
    step[:, 0] = 0
    source = number - step
    for _ in range(number.shape[1].bit_length()):  # each pass doubles the distance
        source = source.gather(1, source)
    return source
