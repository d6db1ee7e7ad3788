"""Models on disk: folders with safetensors and config.json, and checkpoints of the paper's released code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import constants, snapshot_download
from torch import Tensor

from aptvit.encoder.readings import Reading
from aptvit.files.text import printable
from aptvit.files.weights import read_checkpoint, read_weights
from aptvit.hosts.adapter import Adapter
from aptvit.hosts.pretrained import class_names, set_class_names
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.models.saved_files import check_shapes, errors_name, read_settings
from aptvit.patching.budget import Budget
from aptvit.patching.patchifier import Patchifier
from aptvit.scorers.learned import GLANCE
from aptvit.storage.writing import save_model

__all__ = [
    "build",
    "describe",
    "find_folder",
    "is_new",
    "load",
    "load_released_checkpoint",
    "options_of",
    "read_config",
    "save",
    "uniform_of",
]

DETAIL_PREFIX = "cell_detail"  # the name of `aptvit.dense.CellDetail` in networks around a model


class SavedModel(Protocol):
    """A model that can be saved: an `aptvit.AdaptivePatchTransformer`."""

    @property
    def adapter(self) -> Adapter: ...

    patchifier: Patchifier
    resize_only: bool
    num_classes: int
    area_bias: float

    @property
    def reading(self) -> Reading: ...

    @property
    def window_size(self) -> int | None: ...

    @property
    def global_blocks(self) -> frozenset[int]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any: ...


Model = TypeVar("Model", bound=SavedModel)


def is_new(name: str) -> bool:
    """Whether a state-dict key, of a model or a network around it, does not exist in the uniform model."""
    return any(f"{prefix}." in name for prefix in (COARSE_PREFIX, DETAIL_PREFIX, GLANCE))


_OPTIONS = frozenset(Budget.__dataclass_fields__) | {
    "scales",
    "scorer",
    "mean",
    "std",
    "pad",
    "resize_only",
    "area_bias",
    "reading",
}
_OPTIONS |= {"window_size", "global_blocks"}
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_WEIGHTS, _CONFIG = constants.SAFETENSORS_SINGLE_FILE, constants.CONFIG_NAME


def save(model: SavedModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write weights and configuration. ``model.save_pretrained(folder)`` calls this.

    Args:
        model: The model.
        folder: An existing folder to write to.
        weights: A state dict to write instead of the model's own, such as averaged weights.

    Raises:
        ValueError: If the model could not be loaded again: its scorer is a function, or its host has no name or was
            changed.
        WriteError: If the files cannot be written; earlier files are unchanged.
    """
    config = describe(model)
    weights = model.state_dict() if weights is None else weights
    state = dict(weights)
    rebuilt = build(type(model), config, torch.device("meta")).state_dict()
    changed = [name for name in state.keys() | rebuilt.keys() if _shape(state, name) != _shape(rebuilt, name)]
    if changed:
        raise ValueError(
            f"this host is not what its name {config['architecture']!r} and arguments build ({sorted(changed)[0]} "
            "differs), so it could not be loaded again: save model.state_dict() instead"
        )
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    config["dtype"] = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    save_model(folder, state, config)


def describe(model: SavedModel) -> dict[str, Any]:
    """Configuration for `build`, without weights; JSON.

    Raises:
        ValueError: As for `save`.
    """
    config = model.adapter.host_config()
    config["num_classes"] = model.num_classes
    names = class_names(model)
    if names:
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    config["aptvit"] = options_of(model)
    if model.patchifier.calibration is not None:
        config["calibration"] = model.patchifier.calibration
    return config


def options_of(model: SavedModel) -> dict[str, Any]:
    """The options of ``aptvit.adapt`` that make the same model from the same host; JSON."""
    options = {**settings_of(model.patchifier), "resize_only": model.resize_only}
    if model.area_bias:
        options["area_bias"] = model.area_bias
    if model.reading != "resized":
        options["reading"] = model.reading
    if model.window_size is not None:
        options |= {"window_size": model.window_size, "global_blocks": sorted(model.global_blocks)}
    return options


def settings_of(patchifier: Patchifier) -> dict[str, Any]:
    """The options of ``aptvit.adapt`` for a `Patchifier`: budget, scorer and normalisation; JSON.

    Raises:
        ValueError: If the scorer is a function, which cannot be saved.
    """
    if patchifier.scorer_name is None:
        raise ValueError("a scorer that is a callable cannot be saved: save state_dict() and adapt() with it again")
    return {
        **asdict(patchifier.budget),
        "scales": patchifier.num_scales,
        "scorer": patchifier.scorer_name,
        "mean": patchifier.mean,
        "std": patchifier.std,
        "pad": patchifier.pad,
    }


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def find_folder(model_id: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    """Find a folder that `save` wrote, on this machine or on the hub, and read its configuration.

    Args:
        model_id: A folder, or the name of a repository on the hub.
        options: As for ``huggingface_hub.snapshot_download``.

    Returns:
        The folder and the configuration.

    Raises:
        ValueError: If it holds no adaptive model.
    """
    folder = Path(model_id)
    if not folder.is_dir():
        if folder.exists() or model_id.count("/") != 1 or model_id.startswith((".", "/")):
            raise ValueError(f"{model_id} is neither a folder nor the name of a hub repository (owner/name)")
        names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        hub_options = {key: value for key, value in options.items() if key in names and value is not None}
        folder = Path(snapshot_download(model_id, allow_patterns=[_WEIGHTS, _CONFIG], **hub_options))
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"there is no {name} in {folder}: give a folder that save_pretrained wrote")
    config = read_settings(folder / _CONFIG)
    if not isinstance(config.get("aptvit"), dict):
        raise ValueError(f"{folder / _CONFIG} describes no adaptive model: load it with its own library and adapt() it")
    return folder, config


def load(kind: type[Model], folder: Path, config: dict[str, Any]) -> Model:
    """Load the model in a folder, in eval mode.

    Args:
        kind: The class of the model.
        folder: From `find_folder`.
        config: From `find_folder`.

    Raises:
        ValueError: If the class is for hosts of another library, or the files hold no model.
    """
    with errors_name(folder / _CONFIG):
        # Without memory at first: a configuration may ask for more than there is.
        check_shapes(build(kind, config, torch.device("meta")), folder / _WEIGHTS)
        model = build(kind, config, torch.device("cpu"))
        if model.num_classes != config.get("num_classes", model.num_classes):
            raise ValueError(f"num_classes={config['num_classes']}, and the weights are of {model.num_classes}")
        model.load_state_dict(read_weights(folder / _WEIGHTS), strict=True)
    return model


def build(kind: type[Model], config: dict[str, Any], device: torch.device) -> Model:
    """Build a model from the configuration of `describe`, with new weights, in eval mode.

    Args:
        kind: The class of the model.
        config: From `describe`.
        device: Device of the parameters.

    Raises:
        ValueError: If the class is for hosts of another library.
    """
    library = "transformers" if config.get("library") == "transformers" else "timm"
    make: Any = kind
    if make.host_library != library:
        raise ValueError(f"the host of this model is of {library}: load it with aptvit.from_pretrained")
    settings = {key: value for key, value in config["aptvit"].items() if value is not None}
    with torch.device(device):
        model = make(_build_host(config), **settings)
    model.patchifier.calibration = config.get("calibration")
    names = config.get("id2label") or {}
    if not all(isinstance(name, str) for name in names.values()):
        raise ValueError("id2label must hold names of classes")
    if len(names) == model.num_classes > 0:
        set_class_names(model, [str(names[str(number)]) for number in range(len(names))])
    built: Model = model.to(_DTYPES[config.get("dtype", "float32")]).eval()
    return built


def uniform_of(model: SavedModel) -> Any:
    """Build the uniform model of an adaptive model, in eval mode. Both share the memory of their weights.

    Args:
        model: The adaptive model.

    Raises:
        ValueError: If its host has no name to build it from again.
    """
    config, state = model.adapter.host_config(), model.state_dict()
    host: Any = _build_host(config).to(model.adapter.device).eval()
    host.load_state_dict({name: state[name] for name in host.state_dict()}, assign=True)
    classes = class_names(model)
    if classes and config["library"] == "timm":
        set_class_names(host, classes)
    return host


def _build_host(config: dict[str, Any]) -> Any:
    if config.get("library") == "transformers":
        from aptvit.hosts.transformers import build_host
    else:
        from aptvit.hosts.timm_host import build_host
    return build_host(config)


def read_config(file: str | Path) -> dict[str, Any]:
    """Read the options for `aptvit.adapt` from a file of ``aptvit calibrate`` or ``save_pretrained``.

    Example: ``model = aptvit.adapt(vit, **aptvit.read_config("config.json"))``

    Args:
        file: A JSON file, such as ``config.json``.

    Returns:
        Keyword arguments for `aptvit.adapt`.

    Raises:
        ValueError: If there is no such file, or it holds no options of aptvit.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no configuration {path}: `aptvit calibrate PHOTOS --out {path}` writes one")
    options = read_settings(path).get("aptvit")
    if not isinstance(options, dict):
        raise ValueError(f"{printable(path)} holds no options of aptvit: `aptvit calibrate` writes such a file")
    options.pop("calibration", None)
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown or not isinstance(options.get("scorer", ""), str | None):
        raise ValueError(f"{printable(path)}: {unknown[0] if unknown else 'scorer'} is no option of aptvit"[:300])
    return {name: value for name, value in options.items() if value is not None}


def load_released_checkpoint(model: Model, checkpoint: str | Path | Mapping[str, Any]) -> Model:
    """Load a checkpoint of the paper's released code into a model.

    Args:
        model: An adaptive model of the same architecture, with the sub-patch branch (not ``resize_only``).
        checkpoint: A file (.pt, .pth, .ckpt, .safetensors), or its state dict, bare or inside a training checkpoint.

    Returns:
        The model.

    Raises:
        ValueError: If keys are missing, unknown or of another shape; the message names them.
    """
    if model.resize_only:
        raise ValueError("a resize_only model has no place for patch_attn and zero_conv: adapt() without resize_only")
    state = _translate(_read(checkpoint))
    expected = model.state_dict()
    differences = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "of another shape": [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    problems = [
        f"{kind}: {', '.join(keys[:4])}" + " ..." * (len(keys) > 4) for kind, keys in differences.items() if keys
    ]
    if problems:
        raise ValueError(f"this checkpoint does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(state)
    return model


def _read(checkpoint: str | Path | Mapping[str, Any]) -> Mapping[str, Tensor]:
    if isinstance(checkpoint, (str, Path)):
        path = Path(checkpoint)
        if not path.is_file():
            raise ValueError(f"there is no checkpoint {path}")
        checkpoint = read_checkpoint(path)
    state: Any = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("a checkpoint holds tensors by name, this one other values too: give its state dict")
    return state


_RENAMED = {
    "mixed_patch.patch_attn.": f"{COARSE_PREFIX}.conv.",
    "mixed_patch.zero_conv.": f"{COARSE_PREFIX}.linear.",
    "mixed_patch.patch_embed.": "patch_embed.",
    "mixed_patch.base_pos_embed": "pos_embed",
    "mixed_patch.cls_token": "cls_token",
    "mixed_patch.reg_token": "reg_token",
}


def _translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate released names. Several of them name one parameter; base_mini_pos_embed is not used in that code."""
    translated = {}
    for key, value in state.items():
        for wrapper in ("module.", "_orig_mod.", "net.", "model."):
            key = key.removeprefix(wrapper)
        if key == "mixed_patch.base_mini_pos_embed":
            continue
        for old, new in _RENAMED.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        translated[key] = value
    return translated
