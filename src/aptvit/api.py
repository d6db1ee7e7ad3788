"""Adapt a pretrained model, or load an adaptive one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import nn

from aptvit.hosts import is_of_transformers
from aptvit.hosts.pretrained import Host, data_config, load_host
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.checkpoints import find_folder, load, uniform_of

__all__ = ["adapt", "find_saved", "from_pretrained", "host_of", "load_model", "load_saved"]


def adapt(host: nn.Module, **options: Any) -> AdaptivePatchTransformer:
    """Turn a pretrained Vision Transformer into an adaptive one.

    The host's weights are shared, not copied, and the host itself stays as it is. With nothing merged the result is
    the host model, to rounding.

    Args:
        host: A timm VisionTransformer, DeiT or Eva, or a vision tower of transformers (docs/how-to/hugging-face.md).
        options: As for `AdaptivePatchTransformer`: ``thresholds=(5.5, 4.0)`` or ``keep=0.5``, ``scorer="entropy"``, ...
            For models of transformers also ``processor``, see `aptvit.models.tower.AdaptiveTower`.

    Returns:
        The adaptive model: (B, C, H, W) images, or a list of (C, H_i, W_i), to what the host returns.

    Raises:
        ValueError: If the model cannot be adapted, or an option is out of range.
    """
    return _class_of(is_of_transformers(host))(host, **options)


def from_pretrained(folder_or_hub_id: str | Path, **options: Any) -> AdaptivePatchTransformer:
    """Load a model that ``model.save_pretrained`` wrote: weights, thresholds, scorer and all other options.

    Args:
        folder_or_hub_id: A folder, or the name of a repository on the hub.
        options: As for ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``, ...

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: If the folder holds no adaptive model.
    """
    folder, config = find_folder(str(folder_or_hub_id), **options)
    return load(_class_of(config.get("library") == "transformers"), folder, config)


def _class_of(of_transformers: bool) -> type[AdaptivePatchTransformer]:
    """The class of adaptive models for hosts of timm, or of transformers."""
    if not of_transformers:
        return AdaptivePatchTransformer
    from aptvit.models.tower import AdaptiveTower

    return AdaptiveTower


def load_saved(folder: Path | str) -> tuple[Any, dict[str, Any]] | None:
    """Load the adaptive model in a folder, and timm's data configuration of its host.

    Args:
        folder: A folder that ``save_pretrained`` wrote, or the folder of a training.

    Returns:
        The model in eval mode and the configuration; None if the folder holds neither.
    """
    path = find_saved(folder)
    if path is None:
        return None
    model: Any = from_pretrained(path)
    return model, data_config(model.adapter.vit)


def find_saved(folder: Path | str) -> Path | None:
    """The folder that holds the files of a saved model; None if there is none.

    Args:
        folder: As for `load_saved`.
    """
    paths = Path(folder) / "model", Path(folder)
    return next((path for path in paths if (path / constants.CONFIG_NAME).is_file()), None)


def load_model(name: str, checkpoint: Path | None = None, img_size: int | None = None) -> Host:
    """Load the uniform model of a name, or the one around which the adaptive model in a folder was made.

    Args:
        name: Name of a timm model, or a folder that ``save_pretrained`` or a training wrote.
        checkpoint: As for `aptvit.hosts.pretrained.load_host`; not with a folder.
        img_size: As for `aptvit.hosts.pretrained.load_host`; not with a folder.

    Returns:
        The model; ``adaptive`` holds the adaptive model of a folder.

    Raises:
        ValueError: If there is no such model, or a folder is combined with a checkpoint or a size.
    """
    saved = load_saved(name)
    if saved is None:
        return load_host(name, checkpoint, img_size)
    if checkpoint is not None or img_size is not None:
        raise ValueError(
            f"{name} is a saved model with its own weights and size: leave out --checkpoint and --img-size"
        )
    return host_of(*saved)


def host_of(adaptive: Any, data: dict[str, Any] | None = None) -> Host:
    """Return an adaptive model with its uniform model, which shares the memory of the weights.

    Args:
        adaptive: The adaptive model.
        data: timm's data configuration; by default that of its host.

    Raises:
        ValueError: If its host has no name to build it from again.
    """
    data = data_config(adaptive.adapter.vit) if data is None else data
    return Host(uniform_of(adaptive), "trained", data, adaptive=adaptive)
