"""Which of open_clip's models can be adapted: their vision towers on the meta device."""

from __future__ import annotations

from typing import Any

import torch

from aptvit.hosts.catalogue import ModelEntry, NoInitialValues, describe_model, matching, traits_of
from aptvit.hosts.converted import as_timm, reason_not_convertible

__all__ = ["describe_open_clip", "open_clip_names"]

_TEXT = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 8}  # in the place of the text tower, which is not read


def open_clip_names(pattern: str = "*") -> list[str]:
    """Names of open_clip's models that match a pattern, whether or not they can be adapted.

    Raises:
        ImportError: If open_clip is not installed.
    """
    import open_clip  # type: ignore[import-untyped]

    return matching(open_clip.list_models(), pattern)


def describe_open_clip(name: str) -> ModelEntry:
    """Whether the vision tower of a model of open_clip can be adapted.

    Args:
        name: Name for ``open_clip.create_model``.
    """
    import open_clip

    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        entry = describe_model(vision["timm_model_name"])
        return ModelEntry(name, entry.reason, entry.traits, "open_clip")
    with torch.device("meta"), NoInitialValues():
        tower: Any = open_clip.CLIP(
            config["embed_dim"], vision, _TEXT, quick_gelu=config.get("quick_gelu", False)
        ).visual
        reason = reason_not_convertible(tower)
        return ModelEntry(name, reason, {} if reason else traits_of(as_timm(tower)), "open_clip")
