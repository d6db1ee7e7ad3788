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
    if type(host).__module__.startswith("peft."):
        raise ValueError(
            f"a {type(host).__name__} wraps its model: adapt first and give the adaptive model to get_peft_model, or "
            "adapt model.get_base_model(), which shares the adapters' weights, but not their switches"
        )
    if is_of_transformers(host):
        from aptvit.hosts.transformers import TransformersAdapter

        return TransformersAdapter(host)
    library = type(host).__module__.split(".")[0]
    if library in ("torchvision", "open_clip"):
        from aptvit.hosts.converted import as_timm

        host = as_timm(host)
    if library == "torch":
        raise ValueError(
            f"cannot adapt a {type(host).__name__} of torch: give a ViT of timm, transformers, torchvision or "
            "open_clip (docs/hosts.md); `aptvit models` lists what can be adapted"
        )
    if type(host).__name__ == "NaFlexVit":
        from aptvit.hosts.naflex import NaFlexAdapter

        return NaFlexAdapter(host)
    from aptvit.hosts.timm import TimmAdapter

    return TimmAdapter(host)


def is_of_transformers(host: object) -> bool:
    """Whether a model is of transformers; does not import transformers."""
    return any(kind.__module__.split(".")[0] == "transformers" for kind in type(host).__mro__)
