"""EViT: keep the tokens that the class token attends to, fuse the others into one (Liang et al., ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aptvit.merging.blocks import AttentionInputs, Reduction, at_least_float32
from aptvit.merging.reduced import ReducedTransformer, check_host
from aptvit.merging.settings import exclusive_setting, names_setting, setting_of_share

__all__ = ["EViT", "class_attention", "evit"]


@names_setting
def evit(
    model: nn.Module,
    rate: float | None = None,
    *,
    keep: float | None = None,
    layers: Sequence[int] | None = None,
    fuse: bool = True,
) -> ReducedTransformer:
    """Keep, in a few blocks, the share of patch tokens that the class token attends to most.

    Args:
        model: A timm VisionTransformer or DeiT with a class token. Its parameters are shared, and it is not changed.
        rate: Share of its patch tokens that each of these blocks keeps; 0.7 by default.
        keep: Instead of the rate: the share of the patch tokens that enter a block, mean over all blocks, on images of
            the model's own size. The nearest whole percentage is taken as the rate.
        layers: Numbers of these blocks, from 0. By default those at a quarter, a half and three quarters of the depth:
            (3, 6, 9) of 12, (6, 12, 18) of 24, (8, 16, 24) of 32.
        fuse: Replace the other tokens by their sum weighted by attention; otherwise they are dropped.

    Returns:
        The model, from (B, C, H, W) images to (B, num_classes) logits.

    Raises:
        ValueError: If an option is out of range, or the model has no class token or is made of other blocks than
            timm's Block and Attention.
    """
    host = check_host(model)
    depth = len(host.blocks)
    if host.cls_token is None:
        raise ValueError(
            f"EViT scores tokens by the attention of the class token, and this {type(host).__name__} has none: use "
            "aptvit.merging.tome, which needs none"
        )
    chosen = sorted({depth * quarter // 4 for quarter in (1, 2, 3)}) if layers is None else list(layers)
    if not all(layer in range(depth) for layer in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={layers!r} must be different numbers of this model's blocks, from 0 to {depth - 1}")
    prefix, num_patches = host.num_prefix_tokens, math.prod(host.patch_embed.grid_size)

    def reduction(rate: float) -> EViT:
        return EViT([rate if layer in chosen else 1.0 for layer in range(depth)], prefix, fuse=fuse)

    if (chosen_rate := exclusive_setting("rate", rate, keep, 0.7)) is None:
        assert keep is not None
        rates = [percent / 100 for percent in range(100, 0, -1)]
        per_block = lambda rate: reduction(rate).tokens_per_block(prefix + num_patches)  # noqa: E731
        chosen_rate = setting_of_share("evit", rates, per_block, keep, num_patches, prefix)
    if not 0 < chosen_rate <= 1:
        raise ValueError(f"rate={rate!r} must be a share of the patch tokens in (0, 1]")
    return ReducedTransformer(host, reduction(chosen_rate))


class EViT(Reduction):
    """Keeps the patch tokens with the highest attention of the first token, in the order of attention.

    Args:
        keep: Share of the patch tokens to keep, for each block.
        num_prefix_tokens: Class, distillation and register tokens in front: they are always kept.
        fuse: Append the sum of the others, weighted by attention, as a patch token; otherwise they are dropped.
    """

    def __init__(self, keep: Sequence[float], num_prefix_tokens: int, *, fuse: bool = True) -> None:
        super().__init__()
        self.keep = tuple(keep)
        self.num_prefix_tokens = num_prefix_tokens
        self.fuse = fuse

    def forward(
        self, layer: int, x: Tensor, attended: AttentionInputs, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # Sizes are not defined for dropped tokens, or tokens fused with weights that do not sum to one: None.
        prefix, patches = x.tensor_split([self.num_prefix_tokens], dim=1)
        num_kept = math.ceil(self.keep[layer] * patches.shape[1])
        if num_kept == patches.shape[1]:
            return x, None
        scores = class_attention(attended.q, attended.k)[:, self.num_prefix_tokens :]
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :num_kept]
        parts = [prefix, patches.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))]
        if self.fuse:
            weights = scores.scatter(1, order, 0.0)  # a product with all tokens is cheaper than selecting the others
            parts.append((weights[:, None].to(x.dtype) @ patches).to(x.dtype))
        return torch.cat(parts, dim=1), None

    def tokens_per_block(self, num_tokens: int) -> list[int]:
        entering = []
        num_patches = num_tokens - self.num_prefix_tokens
        for keep in self.keep:
            entering.append(self.num_prefix_tokens + num_patches)
            num_kept = math.ceil(keep * num_patches)
            num_patches = num_kept + (self.fuse and num_kept < num_patches)
        return entering

    def extra_repr(self) -> str:
        return f"keep={self.keep}, num_prefix_tokens={self.num_prefix_tokens}, fuse={self.fuse}"


def class_attention(q: Tensor, k: Tensor) -> Tensor:
    """Mean attention over heads of the first token to all tokens. Computes one row of the attention matrix only.

    Args:
        q: (B, H, N, d) queries.
        k: (B, H, N, d) keys.

    Returns:
        (B, N), at least float32. Each row sums to one.
    """
    dtype = at_least_float32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        row = q[:, :, :1].to(dtype) * q.shape[-1] ** -0.5 @ k.to(dtype).transpose(2, 3)  # (B, H, 1, N)
        return row.softmax(dim=-1).mean(dim=(1, 2))
