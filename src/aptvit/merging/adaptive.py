"""Adaptive patches with token merging in the blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from aptvit.merging.blocks import Reduction, check_blocks, through_blocks
from aptvit.merging.reduced import ReducedFeatures, ReducedTransformer
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.layout import PatchLayout

__all__ = ["ReducedAdaptive"]


class ReducedAdaptive(nn.Module):
    """An adaptive model that also reduces tokens inside its blocks. Every token starts with size 1.

    Args:
        model: The adaptive model, with ``keep=``, so that all images have the same number of tokens. It is not changed.
        reduction: The reduction of tokens between attention and MLP of each block.

    Raises:
        ValueError: If the model has thresholds, windows or an area bias, or its blocks are not timm's Block.
    """

    def __init__(self, model: AdaptivePatchTransformer, reduction: Reduction) -> None:
        super().__init__()
        if model.keep is None or model.thresholds is not None:
            raise ValueError(
                "merging after adaptive patches needs images of equal length: adapt(vit, keep=…), not thresholds"
            )
        if model.window_size is not None:
            raise ValueError(
                f"merging in the blocks does not support windows (of {model.window_size} patches): adapt(vit, keep=…) "
                "without window_size="
            )
        if model.area_bias:
            raise ValueError(
                f"merging in the blocks counts every token as one patch: adapt(vit, keep=…) without area_bias="
                f"{model.area_bias}"
            )
        check_blocks(model.adapter.blocks)
        self.model = model
        self.reduction = reduction
        # Pools as a reduced host, with the same parameters; not a child module, which would list parameters twice.
        self._head: ReducedTransformer
        self.__dict__["_head"] = ReducedTransformer(model.adapter.vit, reduction)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Any:
        """Classify images.

        Args:
            images: (B, C, H, W), as the adaptive model takes them.
            layout: The layout of the images, from ``model.layout``; by default it is computed.

        Returns:
            What the host returns: (B, num_classes) logits.

        Raises:
            ValueError: If the images do not fit the model.
        """
        return self.forward_head(self.forward_features(images, layout))

    def forward_features(self, images: Tensor, layout: PatchLayout | None = None) -> ReducedFeatures:
        """Normalised (B, N, D) tokens of the last block, with their sizes; arguments and errors as for `forward`."""
        tokens, layout = self.model.embed(images, layout)
        x, size = through_blocks(self.model.adapter.blocks, layout.packing.to_batch(tokens.x[0]), self.reduction)
        return ReducedFeatures(self.model.adapter.norm(x), size)

    def forward_head(self, features: ReducedFeatures, pre_logits: bool = False) -> Any:
        """Pool the tokens of each image and classify.

        Args:
            features: From `forward_features`.
            pre_logits: Return (B, D) pooled features instead of (B, num_classes) logits.
        """
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
