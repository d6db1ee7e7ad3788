"""DTEM: ToMe's matching by learned features (Lee & Hong, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from aptvit.merging.blocks import AttentionInputs, check_blocks
from aptvit.merging.matching import most_mergeable
from aptvit.merging.reduced import ReducedTransformer, check_host
from aptvit.merging.settings import names_setting
from aptvit.merging.soft import soft_merge
from aptvit.merging.tome import ToMe, schedule_of

__all__ = ["DTEM", "dtem"]

# Added to weights before the logarithm, so that tokens of weight 0 have a finite bias and a gradient.
_LEAST_WEIGHT = 1e-12


@names_setting
def dtem(
    model: nn.Module,
    r: int | tuple[int, float] | Sequence[int] | None = None,
    *,
    keep: float | None = None,
    feat_dim: int | None = None,
    prop_attn: bool = True,
) -> ReducedTransformer:
    """Merge r tokens into their most similar tokens in every block, compared by a learned linear map for each block.

    The maps, the parameters ``reduction.metric.*``, are initialised at random: train them with
    `aptvit.merging.fit_dtem`. In training mode tokens are merged in part and none is removed, so that the maps get
    gradients; in evaluation mode they are merged as in `tome`.

    Args:
        model: A timm VisionTransformer or DeiT. Its parameters are shared, and it is not changed.
        r: As for `tome`.
        keep: As for `tome`: in evaluation mode; in training mode all tokens stay.
        feat_dim: Outputs of each map; by default the size of an attention head, or of two if the width is 1024 or more.
        prop_attn: As for `tome`, in evaluation mode. In training mode attention is always proportional to weights.

    Returns:
        The model, from (B, C, H, W) images to (B, num_classes) logits.

    Raises:
        ValueError: If an option is out of range, or the model is made of other blocks than timm's Block and Attention.
    """
    host = check_host(model)
    schedule = schedule_of(host, r, keep)
    if feat_dim is not None and feat_dim < 1:
        raise ValueError(f"feat_dim={feat_dim!r} must be at least 1, the features that tokens are compared by")
    check_blocks(host.blocks)
    attn = host.blocks[0].attn
    dims = (host.embed_dim, feat_dim or attn.head_dim * (2 if host.embed_dim >= 1024 else 1))
    like = {"device": attn.qkv.weight.device, "dtype": attn.qkv.weight.dtype}
    return ReducedTransformer(host, DTEM(schedule, host.num_prefix_tokens, *dims, prop_attn=prop_attn, **like))


class DTEM(ToMe):
    """ToMe with a learned metric.

    Args:
        r: Tokens to merge, for each block.
        num_prefix_tokens: Class, distillation and register tokens in front: they are not merged.
        embed_dim: Width of the model.
        feat_dim: Features that tokens are compared by.
        prop_attn: Proportional attention: add the logarithm of a token's size to its logits as a key.
        factory: Device and dtype of the parameters.
    """

    def __init__(
        self,
        r: Sequence[int],
        num_prefix_tokens: int,
        embed_dim: int,
        feat_dim: int,
        *,
        prop_attn: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__(r, num_prefix_tokens, prop_attn=prop_attn)
        linears = [nn.Linear(embed_dim, feat_dim, **factory) for _ in r]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.metric = nn.ModuleList(linears)

    def forward(
        self, layer: int, x: Tensor, attended: AttentionInputs, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.training:
            return super().forward(layer, x, attended, size)
        # No token is removed in training, so the number that hard merging would leave follows from the schedule.
        num_effective = self.tokens_per_block(x.shape[1])[layer]
        r = min(self.r[layer], most_mergeable(num_effective, self.num_prefix_tokens))
        if r == 0:
            return x, size
        return soft_merge(x, size, self.metric_of(layer, attended), r, num_effective, self.num_prefix_tokens)

    def metric_of(self, layer: int, attended: AttentionInputs) -> Tensor:
        return self.metric[layer](attended.normed.detach())  # no gradients for the trunk

    def attention_bias(self, size: Tensor | None) -> Tensor | None:
        if self.training and size is not None:
            return (size + _LEAST_WEIGHT).log()
        return super().attention_bias(size)
