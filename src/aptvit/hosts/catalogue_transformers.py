"""Which of transformers' classes for images and clips can be adapted, by their structure on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from aptvit.hosts.catalogue import ModelEntry, NoInitialValues, matching
from aptvit.hosts.inner_vit import InnerViT, is_around_a_vit, reason_not_adaptable
from aptvit.hosts.transformers import TransformersAdapter
from aptvit.hosts.transformers import reason_not_adaptable as reason_against_tower

__all__ = ["class_names_of_transformers", "describe_class"]

_TASKS = (
    *("IMAGE", "BACKBONE", "IMAGE_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "DEPTH_ESTIMATION"),
    *("OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION"),
    *("UNIVERSAL_SEGMENTATION", "IMAGE_SEGMENTATION", "MASK_GENERATION", "POSE_ESTIMATION", "VIDEO_CLASSIFICATION"),
)
_REASONS = {  # of classes whose structure fits
    "Yolos": "its tokens are in another order than its patches, as the comparison of adapt() finds",
    "Cohere2Vision": "it is a vision language model: use aptvit.vlm.adapt(model, processor)",
    "ShieldGemma2": "it is a vision language model: use aptvit.vlm.adapt(model, processor)",
}
_INDICES: dict[str, Any] = {"out_indices": [3, 6, 9, 12]}
_BACKBONE: dict[str, Any] = {"backbone_config": transformers.Dinov2Config(**_INDICES)}  # in place of Swin or ResNet
_OPTIONS = {  # of configurations; all others have their defaults
    "BeitForSemanticSegmentation": _INDICES,
    "Mask2FormerForUniversalSegmentation": _BACKBONE,
    "UperNetForSemanticSegmentation": _BACKBONE,
}


def class_names_of_transformers(pattern: str = "*") -> list[str]:
    """Names of transformers' classes for images and clips that match a pattern, whether or not they can be adapted."""
    names = {name for task in _TASKS for name in _names_of_task(task) if hasattr(transformers, name)}
    return matching(names, pattern)


def _names_of_task(task: str) -> Iterator[str]:
    for names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).values():
        yield from (names,) if isinstance(names, str) else names


def describe_class(name: str) -> ModelEntry:
    """Whether the structure of a class of transformers can be adapted, with its default configuration."""
    reason = next((reason for start, reason in _REASONS.items() if name.startswith(start)), None)
    if reason is not None:
        return _entry(name, reason)
    kind: Any = getattr(transformers, name)
    try:
        with torch.device("meta"), NoInitialValues(), _without_warnings():
            host = kind(kind.config_class(**_OPTIONS.get(name, {})))
    except Exception as error:  # classes raise errors of many types if their default configuration is not complete
        return _entry(name, f"its default configuration makes no model: {' '.join(str(error).split())[:100]}")
    reason = reason_not_adaptable(host) if is_around_a_vit(host) else reason_against_tower(host)
    return _entry(name, reason, {} if reason else _traits(host))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Default configurations of classes that nobody uses so are warned of."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _entry(name: str, reason: str | None, traits: dict[str, str] | None = None) -> ModelEntry:
    return ModelEntry(name, reason, traits or {}, "transformers")


def _traits(host: Any) -> dict[str, str]:
    if is_around_a_vit(host):
        inner = InnerViT(host)
        layers, patch, width = inner.layers, inner.patch_size, inner.embed_dim
    else:
        adapter = TransformersAdapter(host)
        layers, patch, width = adapter.blocks, adapter.patch_size, adapter.embed_dim
    return {"patch": str(patch), "width": str(width), "blocks": f"{len(layers)} {type(layers[0]).__name__}"}
