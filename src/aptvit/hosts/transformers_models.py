"""Models of transformers by folder or name on the hub, with images read by their own processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from aptvit.files.model_folders import read_config
from aptvit.files.text import printable
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.inner_vit import InnerViT, is_around_a_vit, load_class, reason_not_adaptable
from aptvit.hosts.pretrained import Host, data_config, evaluation_transform
from aptvit.hosts.statistics import normalisation
from aptvit.hosts.transformers import TransformersAdapter
from aptvit.patching.images import Normalization

__all__ = ["fetch", "host_in_folder", "load_transformers_host", "save_processor"]

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # configurations, weights and vocabularies
_MAX_SIDE = 16_384  # of images, in pixels
_ANY_ERROR = (  # damaged files make libraries raise errors of many types
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
    *(TypeError, ValueError),
)


def fetch(name: str) -> Path:
    """Fetch a repository of the hub, without weights that are not safetensors.

    Args:
        name: Its name (owner/name).

    Returns:
        The folder of its files.

    Raises:
        ValueError: If the hub gives no such repository.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"there is no folder {printable(name)}, and the hub gave no such model: {reason}") from None


def load_transformers_host(folder: Path, text: Sequence[str] = ()) -> Host:
    """Load the plain model in a folder.

    Args:
        folder: The folder, see `aptvit.files.model_folders.is_of_transformers`.
        text: What to look for, for models of open vocabulary.

    Raises:
        ValueError: If the model cannot be adapted, does not take single images, or needs other inputs.
    """
    names = read_config(folder).get("architectures")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{folder} names no class (architectures): save the model with save_pretrained")
    return host_in_folder(load_class(str(names[0]), folder), folder, text)


def host_in_folder(model: Any, folder: Path, text: Sequence[str] = ()) -> Host:
    """A model with the processor in its folder.

    Args:
        model: The model.
        folder: The folder of its files.
        text: What to look for, for models of open vocabulary.

    Raises:
        ValueError: If the model cannot be adapted, does not take single images, or needs other inputs.
    """
    name = type(model).__name__
    if is_around_a_vit(model):
        reason = reason_not_adaptable(model)
        if reason is not None:
            raise ValueError(f"cannot adapt {folder}: {reason}. docs/hosts.md lists what can be adapted, and why")
    if model.config.is_encoder_decoder or (hasattr(model, "decoder") and hasattr(model, "generate")):
        raise ValueError(f"{name} writes text: adapt it in Python, and compare what generate() of both models gives")
    processor = _processor(folder)
    read = None if processor is None else partial(_read, processor, _further_inputs(name))
    run: Callable[[Any, Tensor], Any] = _run
    if text or name.startswith(("Owl", "CLIPSeg")):
        run = partial(_run_with_text, _tokens(name, folder, text))
    host = Host(model, "trained", _data(model, processor), read=read, run=run, library="transformers")
    _check_runs(host, folder)
    return host


def _processor(folder: Path) -> Any:
    """The image processor in a folder; None if there is none.

    Raises:
        ValueError: If its file is damaged, or it makes images of endless size.
    """
    if not any((folder / name).exists() for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        return None
    try:
        processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except _ANY_ERROR as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the image processor in {folder} cannot be loaded: {reason}") from error
    for name in ("size", "crop_size", "pad_size"):
        sides = list(dict(getattr(processor, name, None) or {}).values())
        if any(side is not None and not (isinstance(side, int) and 0 < side <= _MAX_SIDE) for side in sides):
            raise ValueError(f"the processor in {folder} has {name}={sides}: give 1 to {_MAX_SIDE:,}")
    return processor


@torch.inference_mode()
def _check_runs(host: Host, folder: Path) -> None:
    """Check that the processor reads an image, and that the model runs on it."""
    try:
        image = Image.new("RGB", (64, 48), (120, 130, 140))
        transform = host.read or evaluation_transform(host.data)
        pixels = torch.as_tensor(np.asarray(transform(image)))
        mean, std = (torch.tensor(host.data[name]).view(-1, 1, 1) for name in ("mean", "std"))
        normalised = ((pixels / 255 - mean) / std)[None]
        host.run(host.model, normalised.to(next(host.model.parameters()).dtype))
    except _ANY_ERROR as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the model in {folder} does not run on an image of its processor: {reason}") from error


def _data(model: Any, processor: Any) -> dict[str, Any]:
    """timm's data configuration: size and statistics of the processor; without one those of the model."""
    data = _data_around(model) if is_around_a_vit(model) else data_config(TransformersAdapter(model))
    if processor is None:
        return data
    try:
        statistics = Normalization.of_channels(*normalisation(processor), data["input_size"][0])
        factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
        is_to_one = abs(255 * factor - 1) <= 1e-6
    except TypeError as error:
        raise ValueError(f"{type(processor).__name__} has values of other types than numbers: {error}") from None
    if not is_to_one:
        raise ValueError(f"{type(processor).__name__} does not scale pixels to 0..1: run the model in Python")
    if not all(math.isfinite(value) and value > 0 for value in statistics.std):
        raise ValueError(f"{type(processor).__name__} has image_std={statistics.std}: each must be above 0")
    return {**data, "mean": statistics.mean, "std": statistics.std}


def _data_around(model: Any) -> dict[str, Any]:
    inner = InnerViT(share_parameters(model))
    if inner.depth > 1:
        raise ValueError(f"{type(model).__name__} reads clips: adapt it in Python (docs/how-to/models-around-a-vit.md)")
    config = inner.core.config
    size = getattr(config, "image_size", None) or getattr(model.config, "image_size", None) or 32 * inner.patch_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if inner.num_windows > 1:  # whole windows of whole coarse patches
        step = 2 * inner.patch_size * inner.num_windows
        height, width = (-(-side // step) * step for side in (height, width))
    return {
        **{"input_size": (inner.in_chans, height, width), "interpolation": "bicubic", "crop_pct": 1.0},
        **{"mean": inner.mean, "std": inner.std, "crop_mode": "center"},
    }


def _further_inputs(name: str) -> Callable[[Image.Image], dict[str, Any]]:
    """What a processor needs beside the image: for poses the box of a person, here the whole image."""
    if name.startswith("VitPose"):
        return lambda image: {"boxes": [[[0.0, 0.0, *map(float, image.size)]]]}
    return lambda image: {}


def _read(processor: Any, further: Callable[[Image.Image], dict[str, Any]], image: Image.Image) -> Tensor:
    """(C, H, W) uint8 of an image, resized, cropped and padded as the processor does."""
    image = image.convert("RGB")
    pixels = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt", **further(image))[
        "pixel_values"
    ][0]
    return torch.as_tensor(np.asarray(pixels)).round().clamp(0, 255).to(torch.uint8)


def _run(model: Any, images: Tensor) -> Any:
    return model(pixel_values=images)


def _tokens(name: str, folder: Path, text: Sequence[str]) -> dict[str, Tensor]:
    """Tokens of the text. {name: (texts, L)}"""
    if not name.startswith(("Owl", "CLIPSeg")):
        raise ValueError(f"{name} takes no text: leave out --text")
    if not text:
        raise ValueError(f'{name} looks for what it is told: give --text "a cat,a dog"')
    if name.startswith("CLIPSeg") and len(text) > 1:
        raise ValueError(f"{name} looks for one text in an image: give --text one of {', '.join(text)}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(list(text), padding="max_length", truncation=True, return_tensors="pt")
    return {key: tokens[key] for key in ("input_ids", "attention_mask")}


def _run_with_text(tokens: dict[str, Tensor], model: Any, images: Tensor) -> Any:
    repeated = {key: value.repeat(len(images), 1).to(images.device) for key, value in tokens.items()}
    return model(pixel_values=images, **repeated)


def save_processor(model: Any, folder: Path) -> None:
    """Write the processor beside a model's weights, if it has one, into another folder.

    Args:
        model: A model of transformers.
        folder: The other folder.
    """
    try:
        processor: Any = AutoProcessor.from_pretrained(
            getattr(model.config, "_name_or_path", ""), local_files_only=True
        )
    except _ANY_ERROR:
        return
    processor.save_pretrained(folder)
