"""Adapt a pretrained model, or load an adaptive one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from aptvit import hosts
from aptvit.files.model_folders import SETTINGS_FILE, is_of_transformers
from aptvit.hosts.pretrained import Host, data_config, load_host
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.checkpoints import find_folder, load, uniform_of
from aptvit.models.holding import adapt_held
from aptvit.models.saved_files import errors_name

__all__ = ["adapt", "adaptivity_of", "find_saved", "from_pretrained", "host_of", "load_any", "load_model", "load_saved"]


def adapt(host: nn.Module, **options: Any) -> Any:
    """Turn a pretrained Vision Transformer, or a model with one inside, into an adaptive one.

    The host's weights are shared, not copied, and the host itself stays as it is. With nothing merged the result is
    the host model, to rounding.

    Args:
        host: A timm VisionTransformer, DeiT or Eva; a vision tower of transformers, or a model of transformers around
            a ViT, for depth, detection, segmentation, pose or video (docs/hosts.md).
        options: As for `AdaptivePatchTransformer`: ``thresholds=(5.5, 4.0)`` or ``keep=0.5``, ``scorer="entropy"``, ...
            For models of transformers also ``processor``, see `aptvit.models.tower.AdaptiveTower`; for models around a
            ViT those of `aptvit.models.around.adapt_around`.

    Returns:
        The adaptive model. For timm's models and towers an `AdaptivePatchTransformer`: (B, C, H, W) images, or a list
        of (C, H_i, W_i), to what the host returns. For models around a ViT an instance of a subclass of the host's own
        class, with settings in ``model.aptvit``.

    Raises:
        ValueError: If the model cannot be adapted, or an option is out of range.
    """
    of_transformers = hosts.is_of_transformers(host)
    held = adapt_held(host, **options)
    if held is not None:
        return held
    if of_transformers:
        from aptvit.hosts.inner_vit import is_around_a_vit

        if is_around_a_vit(host):
            from aptvit.models.around import adapt_around

            return adapt_around(host, **options)
    return _class_of("transformers" if of_transformers else type(host).__name__)(host, **options)


def from_pretrained(folder_or_hub_id: str | Path, **options: Any) -> Any:
    """Load a model that ``model.save_pretrained`` wrote: weights, thresholds, scorer and all other options.

    Args:
        folder_or_hub_id: A folder, or the name of a repository on the hub.
        options: As for ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``, ...

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: If the folder holds no adaptive model.
    """
    if _is_around(str(folder_or_hub_id), **options):
        return _load_around(str(folder_or_hub_id), **options)[1]
    folder, config = find_folder(str(folder_or_hub_id), **options)
    is_naflex = "use_naflex" in config.get("model_args", {}) or str(config.get("architecture")).startswith("naflex")
    return load(_class_of("NaFlexVit" if is_naflex else str(config.get("library"))), folder, config)


def _load_around(folder_or_hub_id: str, **options: Any) -> tuple[Any, Any, Path]:
    """The host, the adaptive model around the same parameters, and their folder."""
    from aptvit.models.around import adapt_around
    from aptvit.models.around_files import load_coarse_embed, read_folder

    host, settings, folder = read_folder(folder_or_hub_id, **options)
    with errors_name(folder / SETTINGS_FILE):
        model = adapt_around(host, check=False, **settings["options"]).eval()
    load_coarse_embed(model, folder)
    model.aptvit.patchifier.calibration = settings.get("calibration")
    return host, model, folder


def adaptivity_of(model: Any) -> Any:
    """What a user sets of an adaptive model, its layouts and its patchifier: the model itself, or ``model.aptvit``."""
    return getattr(model, "aptvit", model)


def _is_around(folder_or_hub_id: str, **options: Any) -> bool:
    """Whether a folder, or a repository on the hub, holds a model around a ViT: it has settings of its own."""
    if Path(folder_or_hub_id).exists() or folder_or_hub_id.count("/") != 1 or folder_or_hub_id.startswith((".", "/")):
        return (Path(folder_or_hub_id) / SETTINGS_FILE).exists()  # what is not a file is refused when it is read
    names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    try:
        hf_hub_download(
            folder_or_hub_id, SETTINGS_FILE, **{key: value for key, value in options.items() if key in names}
        )
    except (HfHubHTTPError, OSError, ValueError):  # what else is wrong is told by those that read the other files
        return False
    return True


def _class_of(host: str) -> type[AdaptivePatchTransformer]:
    """The class of adaptive models for "transformers", or for the name of a class of timm."""
    if host == "transformers":
        from aptvit.models.tower import AdaptiveTower

        return AdaptiveTower
    if host == "NaFlexVit":
        from aptvit.models.naflex import AdaptiveNaFlexVit

        return AdaptiveNaFlexVit
    return AdaptivePatchTransformer


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
    if _is_around(str(path)):
        raise ValueError(f"{folder} holds a model around a ViT, which compare, demo, benchmark and calibrate take")
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


def load_any(name: str, checkpoint: Path | None = None, img_size: int | None = None, text: Sequence[str] = ()) -> Host:
    """Load the uniform model of a name, as `load_model`, or a model of transformers, also one around a ViT.

    Args:
        name: As for `load_model`; or a folder, or repository on the hub, with a model of transformers, plain or saved
            by ``save_pretrained`` of its adaptive form.
        checkpoint: As for `load_model`.
        img_size: As for `load_model`.
        text: What to look for, for models of open vocabulary.

    Returns:
        The model, which ``run`` runs on images that ``read`` prepared; ``adaptive`` holds the adaptive model of a
        folder.

    Raises:
        ValueError: If there is no such model, it cannot be adapted, or an option is not for it.
    """
    folder = _folder_of(name)
    if folder is not None:
        from aptvit.hosts.transformers_models import host_in_folder, load_transformers_host

        is_around = _is_around(str(folder))
        is_plain = not is_around and is_of_transformers(folder)
        if (is_around or is_plain) and (checkpoint is not None or img_size is not None):
            raise ValueError(f"{name} has its own weights and size: leave out --checkpoint and --img-size")
        if is_around:
            host, model, _ = _load_around(str(folder))
            return replace(host_in_folder(host, folder, text), adaptive=model)
        if is_plain:
            return load_transformers_host(folder, text)
    if text:
        raise ValueError(f"{name} takes no text: leave out --text")
    return load_model(name if folder is None else str(folder), checkpoint, img_size)


def _folder_of(name: str) -> Path | None:
    """The folder that a name is of, fetched if it is on the hub; None for other names, such as timm's."""
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        return Path(name) if Path(name).is_dir() else None
    from aptvit.hosts.transformers_models import fetch

    return fetch(name)


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
