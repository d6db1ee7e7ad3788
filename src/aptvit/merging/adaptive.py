"""Merging what adaptive patches leave: big patches first, then fewer tokens from block to block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aptvit.merging.blocks import Reduction, check_blocks, through_blocks
from aptvit.merging.reduced import ReducedFeatures, ReducedTransformer
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.layout import PatchLayout

__all__ = ["ReducedAdaptive"]


class ReducedAdaptive(nn.Module):
    """An adaptive model that also loses tokens inside its blocks. Every token counts as one patch at first.

    Args:
        model: The adaptive model, with ``keep=``: its images have equally many tokens. It stays as it is.
        reduction: What happens between attention and MLP.

    Raises:
        ValueError: If lengths differ from image to image, there are windows, or blocks are none of timm's Block.
    """

    def __init__(self, model: AdaptivePatchTransformer, reduction: Reduction) -> None:
        super().__init__()
        if model.keep is None or model.thresholds is not None:
            raise ValueError(
                "merging after adaptive patches needs images of equal length: adapt(vit, keep=…), not thresholds"
            )
        if model.window_size is not None:
            raise ValueError(
                f"merging in the blocks knows no windows (of {model.window_size} patches): adapt(vit, keep=…) without "
                "window_size="
            )
        if model.area_bias:
            raise ValueError(
                f"merging in the blocks counts every token as one patch: adapt(vit, keep=…) without area_bias="
                f"{model.area_bias}"
            )
        check_blocks(model.adapter.blocks)
        self.model = model
        self.reduction = reduction
        # Pools as a reduced host does, around the same parameters; not a child, or it would name them twice.
        self._head: ReducedTransformer
        self.__dict__["_head"] = ReducedTransformer(model.adapter.vit, reduction)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Any:
        """Classify images.

        Args:
            images: (B, C, H, W), as the adaptive model takes them.
            layout: From ``model.layout``, where it is known already.
        """
        return self.forward_head(self.forward_features(images, layout))

    def forward_features(self, images: Tensor, layout: PatchLayout | None = None) -> ReducedFeatures:
        """Normalised tokens of the last block, with their sizes."""
        tokens, layout = self.model.embed(images, layout)
        x, size = through_blocks(self.model.adapter.blocks, layout.packing.to_batch(tokens.x[0]), self.reduction)
        return ReducedFeatures(self.model.adapter.norm(x), size)

    def forward_head(self, features: ReducedFeatures, pre_logits: bool = False) -> Any:
        """Pool the tokens of each image and classify."""
        return self._head.forward_head(features, pre_logits)

    def tokens_per_block(self, grid_size: tuple[int, int]) -> list[int]:
        """Tokens that enter each block, prefix tokens included.

        Args:
            grid_size: Base patches of the images, (rows, columns).
        """
        assert self.model.keep is not None
        num_patches = grid_size[0] * grid_size[1]
        kept = num_patches - 3 * round((1 - self.model.keep) * num_patches / 3)
        return self.reduction.tokens_per_block(kept + self.model.num_prefix_tokens)
