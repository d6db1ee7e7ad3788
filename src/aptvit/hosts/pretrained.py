"""timm models by name, with pretrained weights if they are available, for the command line."""

from __future__ import annotations

import difflib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, try_to_load_from_cache
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from aptvit.files.text import printable
from aptvit.files.weights import check_checkpoint
from aptvit.hosts.catalogue import describe_model
from aptvit.patching.images import Normalization

__all__ = [
    "Host",
    "check_model",
    "class_names",
    "data_config",
    "evaluation_transform",
    "imagenet_wnids",
    "load_host",
    "num_classes_of",
    "set_class_names",
]

_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


@dataclass(frozen=True)
class Host:
    """A model to adapt.

    Attributes:
        model: The model, in eval mode.
        weights: Source of its weights: "random", "pretrained", or a file.
        data: timm's data configuration (input_size, mean, std, interpolation, crop_pct, crop_mode).
        network_of: Puts the model, or its adaptive form, into the network that it is part of; None without one.
        adaptive: The adaptive model in a saved folder, around `model`; None for other models.
        read: Resizes and crops an image as the model's own processor does, to (C, H, W) uint8; None for timm's
            transform of ``data``.
        run: (the model or its adaptive form, a normalised batch) -> its output.
        library: Whose model it is: "timm" or "transformers".
    """

    model: nn.Module
    weights: str
    data: dict[str, Any]
    network_of: Callable[[nn.Module], nn.Module] | None = None
    adaptive: Any = None
    read: Callable[[Image.Image], Tensor] | None = None
    run: Callable[[Any, Tensor], Any] = lambda model, images: model(images)
    library: str = "timm"


def check_model(name: str) -> None:
    """Check that timm has a model of this name, with these weights, and that it can be adapted.

    Raises:
        ValueError: If not; the message lists the alternatives.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        matches = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(matches)}?" if matches else "`aptvit models` lists those that can be adapted"
        raise ValueError(f"timm has no model {name!r}: {hint}")
    tag = name.partition(".")[2]
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"{architecture} has no weights {tag!r}: use one of {', '.join(tags) or 'none'}")
    reason = describe_model(architecture).reason
    if reason is not None:
        raise ValueError(f"cannot adapt {name}: {reason}. `aptvit models` lists what can be adapted")


def load_host(name: str, checkpoint: Path | None = None, img_size: int | None = None, hub_timeout: float = 5.0) -> Host:
    """Build a timm model with a checkpoint, with pretrained weights if the hub answers, or with random weights.

    Args:
        name: Name of a timm model.
        checkpoint: Weights to load (.safetensors, .pth); position embeddings are resampled to the image size.
        img_size: Side of the input in pixels; the model's own by default.
        hub_timeout: Seconds to wait for the hub.

    Raises:
        ValueError: If there is no such model, it cannot be adapted, or the checkpoint does not fit it.
    """
    check_model(name)
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if checkpoint is None:
        pretrained = _weights_at_hand(name, hub_timeout)
        model = timm.create_model(name, pretrained=pretrained, **options)
        weights = "pretrained" if pretrained else "random"
    else:
        model = _from_checkpoint(name, checkpoint, options)
        weights = str(checkpoint)
    data = timm.data.resolve_model_data_config(model)
    if img_size is not None:
        data["input_size"] = (data["input_size"][0], img_size, img_size)
    return Host(model.eval(), weights, data)


def data_config(model: Any) -> dict[str, Any]:
    """timm's data configuration of a model, with the model's own image size.

    The size may differ from that of its pretrained weights, which is what timm tells.

    Args:
        model: A model of timm, or the host of a tower.

    Raises:
        ValueError: If mean or standard deviation do not fit the channels.
    """
    data: dict[str, Any] = timm.data.resolve_model_data_config(model)
    normalization = Normalization.of_channels(data["mean"], data["std"], data["input_size"][0])
    data |= {"mean": normalization.mean, "std": normalization.std}
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return data if side is None else {**data, "input_size": (data["input_size"][0], *side)}


def evaluation_transform(data: dict[str, Any]) -> Any:
    """timm's transform of an image for evaluation, to (C, H, W) uint8.

    Args:
        data: timm's data configuration.
    """
    options = {name: data[name] for name in ("input_size", "interpolation", "crop_pct")}
    return timm.data.create_transform(
        **options, is_training=False, crop_mode=data.get("crop_mode"), use_prefetcher=True
    )


def class_names(model: Any) -> list[str] | None:
    """Names of the classes of a model, in the order of its logits.

    Names that `set_class_names` stored, which saved models keep; else those of a classifier of transformers, or of
    ImageNet for a classifier with the number of classes of one of its subsets.

    Args:
        model: A model of timm, or an adaptive model.

    Returns:
        A name for each class; None if there are no names.
    """
    host = model.adapter.vit if hasattr(model, "adapter") else model
    num_classes = num_classes_of(model) or getattr(getattr(host, "config", None), "num_labels", 0)  # of boxes, regions
    names = (getattr(host, "pretrained_cfg", None) or {}).get("label_names")
    if not names:
        names = getattr(getattr(host, "config", None), "id2label", None)
        names = [names[i] for i in range(num_classes) if i in names] if isinstance(names, dict) else None
        if names == [f"LABEL_{i}" for i in range(num_classes)]:  # the default of transformers
            names = None
    if names and len(names) == num_classes:
        return list(names)
    info = _imagenet(num_classes)
    return None if info is None else _words(info)


def num_classes_of(model: Any) -> int:
    """Classes of an image that a model tells apart; 0 for models of another kind."""
    if type(model).__name__.endswith("ForImageClassification") and not hasattr(model, "num_classes"):
        return int(model.config.num_labels)
    return int(getattr(model, "num_classes", 0) or 0)


def imagenet_wnids(names: Sequence[str]) -> list[str] | None:
    """ImageNet's identifiers (n01440764) of classes; None unless `class_names` gives these names for ImageNet."""
    info = _imagenet(len(names))
    return info.label_names() if info is not None and _words(info) == list(names) else None


def _imagenet(num_classes: int) -> ImageNetInfo | None:
    subset = infer_imagenet_subset({"num_classes": num_classes}) if num_classes else None
    return ImageNetInfo(subset) if subset else None


def _words(info: ImageNetInfo) -> list[str]:
    """The first of the words that describe a class, for each class."""
    return [info.index_to_description(i).split(",")[0] for i in range(info.num_classes())]


def set_class_names(model: Any, names: Sequence[str]) -> None:
    """Store the names of the classes of a model, for `class_names`.

    Args:
        model: A model of timm, or an adaptive model.
        names: A name for each class, in the order of the logits.

    Raises:
        ValueError: If there are not as many names as classes.
    """
    num_classes = getattr(model, "num_classes", 0)
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} names for {num_classes} classes: give a name for each class")
    host = model.adapter.vit if hasattr(model, "adapter") else model
    if hasattr(host, "config"):  # of transformers
        host.config.id2label = dict(enumerate(names))
        host.config.label2id = {name: number for number, name in enumerate(names)}
    else:
        host.pretrained_cfg = {**(getattr(host, "pretrained_cfg", None) or {}), "label_names": tuple(names)}


def _from_checkpoint(name: str, checkpoint: Path, options: dict[str, Any]) -> nn.Module:
    if not checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {checkpoint}")
    check_checkpoint(checkpoint)
    try:
        head = timm.models.load_state_dict(str(checkpoint)).get("head.weight")
        if head is not None:
            options = {**options, "num_classes": len(head)}
        # timm resamples position embeddings when it loads a file as pretrained weights.
        overlay = {"file": str(checkpoint), "num_classes": options.get("num_classes", 0)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # damaged files raise errors of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"checkpoint {printable(checkpoint)} does not fit {name}: {reason}") from error


def _weights_at_hand(name: str, timeout: float) -> bool:
    """Whether pretrained weights are in the cache, or the hub answers within ``timeout`` seconds."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not config.has_weights:
        return False
    if config.hf_hub_id is None:
        return config.file is not None
    if any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in _HUB_FILES):
        return True
    url = f"{constants.ENDPOINT}/api/models/{config.hf_hub_id}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return not constants.HF_HUB_OFFLINE
    except (urllib.error.URLError, OSError, ValueError):
        return False
