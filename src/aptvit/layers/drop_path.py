"""Stochastic depth of packed images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.layers.attention import current_handler

__all__ = ["PackedDropPath"]


class PackedDropPath(nn.Module):
    """Stochastic depth per image of a packed sequence.

    Args:
        drop_prob: Probability that an image skips the branch.
        scale_by_keep: Divide the branches of the other images by 1 - ``drop_prob``.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D), inside `run_block`."""
        if not self.training or self.drop_prob == 0:
            return x
        handler = None if torch.compiler.is_dynamo_compiling() else current_handler()
        # dropout1d drops whole channels; an AttentionHandler intercepts it and drops whole images instead.
        drop = F.dropout1d if handler is None else handler.drop
        x = drop(x, self.drop_prob)
        return x if self.scale_by_keep else x * (1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"
