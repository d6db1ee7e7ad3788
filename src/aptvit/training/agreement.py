"""What a training that is continued must agree on with its checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aptvit.datasets.boxes import BoxFiles
from aptvit.datasets.masks import MaskFiles
from aptvit.hosts.pretrained import Host
from aptvit.storage.agreement import differences, digest_tensors, digest_texts
from aptvit.training.recipes.common import Recipe

__all__ = ["check_agreement", "describe_data", "describe_host", "describe_recipe"]

# Settings that do not change what is trained, and those that the state of the optimizer is for.
_FREE = ("workers", "save_every", "keep_checkpoints", "eval_every")
_FIXED = ("format", "task", "method", "optimizer", "trains", "shard")


def describe_host(host: Host) -> dict[str, Any]:
    """Name, digest of the weights, and preprocessing of the model that a training begins with.

    Random weights have no digest: they differ each time, and those of the checkpoint replace them.
    """
    config = getattr(host.model, "pretrained_cfg", None) or {}
    state = dict(host.model.state_dict())
    if host.adaptive is not None:
        state |= {f"adaptive.{name}": value for name, value in host.adaptive.state_dict().items()}
    weights = "random" if host.weights == "random" else digest_tensors(state)
    name = config.get("architecture") or type(host.model).__name__
    images = {f"{key} of images": host.data.get(key) for key in ("input_size", "mean", "std", "interpolation")}
    return {"model": name, "weights of the model": weights, **images, "crop of images": host.data.get("crop_pct")}


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Settings of a recipe by name, without those that do not change what is trained."""
    values = {name: value for name, value in vars(recipe).items() if name not in _FREE}
    return {"task": recipe.task, **values}


def describe_data(images: Any) -> str:
    """Number of the images, and a digest of their names, order and annotations; not of what is in the files.

    Args:
        images: A source, or files with boxes or masks; None for none.
    """
    if images is None:
        return "none"
    names = [images.name(i) for i in range(len(images))]
    # A folder that was moved holds the same images.
    first_and_last = [min(names), max(names)] if names else [""]
    common = os.path.commonprefix(first_and_last).rpartition("/")[0]  # noqa: RUF071 - up to the last slash
    digest = digest_texts(text for i, name in enumerate(names) for text in (name[len(common) :], *_labels(images, i)))
    return f"{len(names)} ({digest})"


def _labels(images: Any, index: int) -> tuple[str, ...]:
    if isinstance(images, BoxFiles):
        return str(images.boxes[index].tolist()), str(images.labels[index].tolist())
    if isinstance(images, MaskFiles):
        return (images.masks[index].name,)
    return (str(images.label(index)),)


def check_agreement(folder: Path, before: dict[str, Any], now: dict[str, Any], allow_changes: bool) -> list[str]:
    """Compare a training with its checkpoint.

    Args:
        folder: The checkpoint, for the message.
        before: Values of the checkpoint.
        now: Values of the training that continues it.
        allow_changes: Return what differs instead of raising, where the checkpoint can be used at all.

    Returns:
        A text for each difference.

    Raises:
        ValueError: If something differs, and is not allowed to.
    """
    changes = differences(before, now)
    fixed = differences(*({name: values.get(name) for name in _FIXED} for values in (before, now)))
    remedy = "take what it was trained with, or begin in another --out"
    if fixed:
        raise ValueError(f"{folder} cannot be continued with other settings ({'; '.join(fixed)}): {remedy}")
    if changes and not allow_changes:
        raise ValueError(
            f"{folder} was trained with other settings ({'; '.join(changes)}): {remedy}, or continue all the same "
            "with --allow-changes"
        )
    return changes
