"""A host with fewer tokens: the same parameters under the same names, and timm's protocol."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aptvit.hosts.adapter import HOST_ATTRIBUTES, share_parameters, share_registries
from aptvit.merging.blocks import Reduction, check_blocks, through_blocks

__all__ = ["HostView", "ReducedFeatures", "ReducedTransformer", "check_host"]


@dataclass(frozen=True, eq=False)
class ReducedFeatures:
    """Outputs of the blocks.

    Attributes:
        tokens: (B, N, D) normalised tokens, prefix tokens first.
        size: (B, N) number of patches in each token; None if all are 1.
    """

    tokens: Tensor
    size: Tensor | None


def check_host(host: nn.Module) -> Any:
    """Check that the tokens of a host can be reduced, and return the host.

    Raises:
        ValueError: If it is not timm's VisionTransformer or VisionTransformerDistilled.
    """
    if type(host) in (VisionTransformer, VisionTransformerDistilled):
        return host
    raise ValueError(
        f"cannot reduce the tokens of a {type(host).__name__}: give timm's VisionTransformer or "
        "VisionTransformerDistilled (DeiT), not a model derived from it or made of it"
    )


class HostView(nn.Module):
    """Base of the baselines: a view of a host with the same parameters, of which subclasses override single steps.

    Args:
        host: A timm VisionTransformer or VisionTransformerDistilled. It is not changed.

    Raises:
        ValueError: If the model is of another class.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.vit: Any
        self.__dict__["vit"] = share_parameters(check_host(host))  # no child module: that would rename parameters
        share_registries(self.vit, self)
        self.grad_checkpointing = False
        self.train(host.training)

    def forward(self, images: Tensor) -> Any:
        """Classify images.

        Args:
            images: (B, C, H, W), normalised as the host expects.

        Returns:
            What the host returns: (B, num_classes) logits.

        Raises:
            ValueError: If the images do not fit the model.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> ReducedFeatures:
        """Normalised (B, N, D) tokens of the last block, with their sizes.

        Args:
            images: As for `forward`.

        Raises:
            ValueError: If the images do not fit the model.
        """
        self._check(images)
        x, size = self._through_blocks(self._embed(images))
        return ReducedFeatures(self.vit.norm(x), size)

    def forward_head(self, features: ReducedFeatures, pre_logits: bool = False) -> Any:
        """Pool the tokens of each image and classify.

        Args:
            features: From `forward_features`.
            pre_logits: Return (B, D) pooled features instead of (B, num_classes) logits.
        """
        return self.vit.forward_head(features.tokens, pre_logits=pre_logits)

    def tokens_per_block(self, grid_size: tuple[int, int] | None = None) -> list[int]:
        """Tokens that enter each block, prefix tokens included.

        Args:
            grid_size: (rows, columns) of patches of the images; by default the host's own.
        """
        return [self._num_tokens(grid_size)] * len(self.vit.blocks)

    # Steps that subclasses override

    def _check(self, images: Tensor) -> None:
        self._check_batch(images)
        embed, size = self.vit.patch_embed, tuple(images.shape[2:])
        if not isinstance(embed, PatchEmbed) or embed.img_size is None:
            return
        if embed.strict_img_size and size != tuple(embed.img_size):
            raise ValueError(
                f"images of {_format_size(size)} do not fit a model for {_format_size(embed.img_size)}: resize them, "
                "or build the host with dynamic_img_size=True"
            )
        if not embed.dynamic_img_pad and any(side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
            raise ValueError(
                f"images of {_format_size(size)} are not made of whole patches of {_format_size(embed.patch_size)}: "
                "resize them, or build the host with dynamic_img_pad=True"
            )

    def _check_batch(self, images: Tensor) -> None:
        if isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == self.vit.in_chans:
            return
        got = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"in a {type(images).__name__}"
        raise ValueError(f"images {got} are not a batch (B, {self.vit.in_chans}, H, W): stack images of one size")

    def _embed(self, images: Tensor) -> Tensor:
        """Input of the first block. (B, C, H, W) -> (B, N, D)"""
        vit = self.vit
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))

    def _through_blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        checkpointing = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self.vit.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
        return x, None

    def _num_tokens(self, grid_size: tuple[int, int] | None) -> int:
        rows, columns = grid_size or self.vit.patch_embed.grid_size
        return self.vit.num_prefix_tokens + rows * columns

    # timm's protocol

    def get_classifier(self) -> Any:
        """The host's classifier."""
        return self.vit.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one; the host keeps its own."""
        self.vit.reset_classifier(num_classes, global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The host's layer groups."""
        return self.vit.group_matcher(coarse)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the host exempts from weight decay."""
        return self.vit.no_weight_decay()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def train(self, mode: bool = True) -> HostView:
        super().train(mode)
        self.vit.training = mode
        return self

    def __getattr__(self, name: str) -> Any:
        if name in HOST_ATTRIBUTES:
            return getattr(self.vit, name)
        return super().__getattr__(name)


class ReducedTransformer(HostView):
    """A host that reduces tokens inside its blocks.

    Average pooling weights tokens by their size, and attention pooling has the bias of the blocks' attention. Other
    pooling (class token, maximum) is the host's.

    Args:
        host: A timm VisionTransformer or VisionTransformerDistilled, made of timm's Block and Attention.
        reduction: The reduction of tokens between attention and MLP of each block.

    Raises:
        ValueError: If the model is of another class or has other blocks.
    """

    def __init__(self, host: nn.Module, reduction: Reduction) -> None:
        super().__init__(host)
        check_blocks(self.vit.blocks)
        self.reduction = reduction
        self.train(host.training)

    def tokens_per_block(self, grid_size: tuple[int, int] | None = None) -> list[int]:
        return self.reduction.tokens_per_block(self._num_tokens(grid_size))

    def forward_head(self, features: ReducedFeatures, pre_logits: bool = False) -> Any:
        vit, pool = self.vit, self._pool()
        if features.size is None or pool is None:
            return super().forward_head(features, pre_logits)
        start = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
        x = vit.head_drop(vit.fc_norm(pool(features.tokens[:, start:], features.size[:, start:])))
        return x if pre_logits else vit.head(x)

    def _through_blocks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return through_blocks(self.vit.blocks, x, self.reduction, checkpointing=self.grad_checkpointing)

    def _pool(self) -> Any:
        """The host's pooling with sizes, (B, N, D), (B, N) -> (B, D); None if the pooling does not depend on sizes."""
        pool = self.vit.attn_pool
        if isinstance(pool, AttentionPoolLatent):
            return partial(self._attention_pool, pool)
        if pool is None:
            return {"avg": _mean, "avgmax": _mean_and_maximum}.get(self.vit.global_pool)
        return None

    def _attention_pool(self, pool: nn.Module, tokens: Tensor, size: Tensor) -> Tensor:
        bias = self.reduction.attention_bias(size)
        return pool(tokens, attn_mask=None if bias is None else bias[:, None, None].to(tokens.dtype))


def _mean(tokens: Tensor, size: Tensor) -> Tensor:
    """The mean of tokens weighted by size. (B, N, D), (B, N) -> (B, D)"""
    share = size / size.sum(dim=1, keepdim=True)
    return (tokens * share[..., None]).sum(dim=1).to(tokens.dtype)


def _mean_and_maximum(tokens: Tensor, size: Tensor) -> Tensor:
    return 0.5 * (tokens.amax(dim=1) + _mean(tokens, size))


def _format_size(size: Any) -> str:
    height, width = size
    return f"{height}x{width}"
