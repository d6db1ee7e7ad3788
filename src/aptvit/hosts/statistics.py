"""Mean and standard deviation that models of transformers expect their images to be normalised with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

__all__ = ["CLIP", "HALF", "IMAGENET", "Statistics", "normalisation", "published_statistics"]

Statistics = tuple[Sequence[float], Sequence[float]]  # (C,) mean and (C,) standard deviation, of pixels in [0, 1]
IMAGENET: Statistics = (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
HALF: Statistics = (tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD))
CLIP: Statistics = (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))


def normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a processor of images, or of images and text, normalises with.

    Returns:
        (C,) mean and (C,) standard deviation, of pixels in [0, 1].

    Raises:
        ValueError: If the processor has none.
    """
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if mean is None or std is None:
        raise ValueError(
            f"{type(processor).__name__} has no image_mean and image_std: give the model's own processor, as "
            "AutoProcessor or AutoImageProcessor loads it, or mean= and std="
        )
    if not getattr(images, "do_normalize", True):
        return (0.0,) * len(mean), (1.0,) * len(std)
    return tuple(mean), tuple(std)


def published_statistics(host: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation in the file of the image processor beside the weights, if it is on this machine."""
    source = getattr(host.config, "_name_or_path", "")
    if not source:
        return None
    try:
        config, _ = transformers.BaseImageProcessor.get_image_processor_dict(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    if config.get("image_mean") is None or config.get("image_std") is None:
        return None
    return tuple(config["image_mean"]), tuple(config["image_std"])
