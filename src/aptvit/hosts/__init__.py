"""Adapters to the models of timm and of transformers, and which of these models can be adapted.

May import timm, transformers, `aptvit.layers` and `aptvit.patching`.
"""

from __future__ import annotations

from torch import nn

from aptvit.hosts.adapter import Adapter

__all__ = ["Adapter", "get_adapter", "is_of_transformers"]


def get_adapter(host: nn.Module) -> Adapter:
    """The adapter of a host model.

    Raises:
        ValueError: If the model cannot run on adaptive patches; the message gives the reason.
    """
    if is_of_transformers(host):
        from aptvit.hosts.transformers import TransformersAdapter

        return TransformersAdapter(host)
    from aptvit.hosts.timm import TimmAdapter

    return TimmAdapter(host)


def is_of_transformers(host: object) -> bool:
    """Whether a model is of transformers; does not import transformers."""
    return any(kind.__module__.split(".")[0] == "transformers" for kind in type(host).__mro__)
