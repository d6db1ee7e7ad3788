"""One file per host library: how to enter a pretrained model (tokens in, blocks, head out)."""

from __future__ import annotations

from torch import nn

from aptvit.adapters.base import Adapter

__all__ = ["Adapter", "get_adapter"]


def get_adapter(host: nn.Module) -> Adapter:
    """The adapter of a host model.

    Raises:
        ValueError: If the model cannot run on adaptive patches; the message says why.
    """
    from aptvit.adapters.timm import TimmAdapter

    return TimmAdapter(host)
