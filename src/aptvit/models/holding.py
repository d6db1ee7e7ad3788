"""Models that hold a ViT: open_clip's, and timm's inside transformers. All but the ViT stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from aptvit.hosts.adapter import share_parameters
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["adapt_held", "adapt_open_clip", "adapt_timm_wrapper"]

_READ = ("image_size", "output_dim", "preprocess_cfg", "image_mean", "image_std", "output_tokens")


def adapt_held(host: Any, **options: Any) -> Any | None:
    """Adapt the ViT that a model of open_clip, or a TimmWrapper of transformers, holds; None for other models.

    Args:
        host: The model.
        options: As for `aptvit.AdaptivePatchTransformer`.

    Raises:
        ValueError: If it cannot be adapted.
    """
    if type(host).__module__.split(".")[0] == "open_clip":
        return adapt_open_clip(host, **options)
    if getattr(getattr(host, "config", None), "model_type", "") == "timm_wrapper":
        return adapt_timm_wrapper(host, **options)
    return None


def adapt_timm_wrapper(host: Any, **options: Any) -> Any:
    """Adapt a TimmWrapperForImageClassification of transformers.

    Args:
        host: The model. It stays as it is, and shares its parameters with the result.
        options: As for `aptvit.AdaptivePatchTransformer`.

    Returns:
        A copy of the model with an adaptive ``timm_model``, whose settings are ``model.aptvit``.

    Raises:
        ValueError: If the model cannot be adapted.
    """
    if not type(host).__name__.endswith("ForImageClassification"):
        raise ValueError(
            f"cannot adapt this model: {type(host).__name__} returns the tokens of full grids. Adapt its timm_model, "
            "which returns packed tokens with their patches"
        )
    return _with(host, "timm_model", AdaptivePatchTransformer(host.timm_model, **options))


def _with(host: nn.Module, name: str, adaptive: AdaptivePatchTransformer) -> Any:
    """A copy of a model, with an adaptive one as one of its children and as ``aptvit``."""
    model = share_parameters(host)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, adaptive)
    object.__setattr__(model, "aptvit", adaptive)  # not a second child
    return model


def adapt_open_clip(host: Any, **options: Any) -> Any:
    """Adapt a model of open_clip, or its vision tower alone.

    Args:
        host: A CLIP, CustomTextCLIP or similar model, whose ``visual`` is a VisionTransformer or a model of timm; or
            such a ``visual``. It stays as it is, and shares the memory of its weights with the result.
        options: As for `aptvit.AdaptivePatchTransformer`.

    Returns:
        A copy of the model with an adaptive ``visual``, whose settings are ``model.aptvit``; for a tower alone, an
        `AdaptivePatchTransformer`.

    Raises:
        ValueError: If the tower cannot be adapted.
    """
    visual = getattr(host, "visual", None)
    if visual is None:
        return AdaptivePatchTransformer(host, **options)
    trunk = getattr(visual, "trunk", None)  # a model of timm and a projection
    if trunk is not None:
        return _with(host, "visual.trunk", AdaptivePatchTransformer(trunk, **options))
    adaptive = AdaptivePatchTransformer(visual, **options)
    for name in _READ:
        if hasattr(visual, name):
            setattr(adaptive, name, getattr(visual, name))
    return _with(host, "visual", adaptive)
