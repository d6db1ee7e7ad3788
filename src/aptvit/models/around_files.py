"""Models around a ViT on disk: the plain folder of transformers, and beside it what adaptivity adds.

aptvit.json         class of the host, settings and calibration
aptvit.safetensors  the sub-patch branch of Eq. 2, if the model has one
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from aptvit.files.model_folders import SETTINGS_FILE
from aptvit.files.weights import read_weights
from aptvit.hosts.inner_vit import load_class
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.models.checkpoints import settings_of
from aptvit.models.saved_files import check_shapes, errors_name, read_settings
from aptvit.models.settings import WEIGHTS_FILE
from aptvit.storage.writing import save_weights, write_json

__all__ = ["load_coarse_embed", "read_folder", "save_settings"]


def save_settings(model: Any, folder: Path) -> None:
    """Write what adaptivity adds to the folder of a host.

    Args:
        model: From `aptvit.models.around.adapt_around`.
        folder: The folder of the host.

    Raises:
        ValueError: If the scorer is a function, which cannot be saved.
        WriteError: If the files cannot be written.
    """
    adaptivity = model.aptvit
    options = {**settings_of(adaptivity.patchifier), "resize_only": adaptivity.resize_only}
    options.pop("pad")
    if adaptivity.area_bias:
        options["area_bias"] = adaptivity.area_bias
    if not adaptivity.resize_only:
        save_weights(getattr(model, COARSE_PREFIX).state_dict(), folder / WEIGHTS_FILE)
    settings = {"architecture": model.host_class.__name__, "options": options}
    write_json(folder / SETTINGS_FILE, {**settings, "calibration": adaptivity.patchifier.calibration})


def read_folder(folder_or_hub_id: str, **options: Any) -> tuple[Any, dict[str, Any], Path]:
    """Load the host in a folder that ``model.save_pretrained`` wrote, and read what makes it adaptive.

    Args:
        folder_or_hub_id: A folder, or the name of a repository on the hub.
        options: As for ``huggingface_hub.snapshot_download``.

    Returns:
        The host in eval mode, the settings that `save_settings` wrote, and the folder.

    Raises:
        ValueError: If the folder holds no such model.
    """
    folder = Path(folder_or_hub_id)
    if not folder.is_dir():
        folder = Path(snapshot_download(folder_or_hub_id, **options))
    file = folder / SETTINGS_FILE
    settings = read_settings(file)
    if "aptvit" in settings:
        raise ValueError(f"{folder} holds a vision language model: load it with aptvit.vlm.from_pretrained")
    with errors_name(file):
        settings["options"] = {key: value for key, value in settings["options"].items() if value is not None}
        host = load_class(str(settings["architecture"]), folder)
    return host, settings, folder


def load_coarse_embed(model: Any, folder: Path) -> None:
    """Load the sub-patch branch of Eq. 2 into a model, if it has one.

    Args:
        model: The model.
        folder: The folder.

    Raises:
        ValueError: If the file does not hold its weights.
    """
    if not model.aptvit.resize_only:
        with errors_name(folder / WEIGHTS_FILE):
            check_shapes(getattr(model, COARSE_PREFIX), folder / WEIGHTS_FILE)
            getattr(model, COARSE_PREFIX).load_state_dict(read_weights(folder / WEIGHTS_FILE))
