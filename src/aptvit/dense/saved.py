"""Detectors and segmenters on disk: folders with safetensors and config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn

from aptvit.dense.detector import make_detector
from aptvit.dense.segmenter import make_segmenter
from aptvit.files.text import printable
from aptvit.files.weights import read_weights, shapes_of_weights
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.checkpoints import build, describe, is_new
from aptvit.models.saved_files import check_shapes, errors_name, read_settings
from aptvit.storage.writing import save_model

__all__ = ["DenseModel", "from_pretrained", "save", "start_from"]

_WEIGHTS, _CONFIG = constants.SAFETENSORS_SINGLE_FILE, constants.CONFIG_NAME
_OPTIONS = {
    "detection": {"num_classes", "masks", "cascade", "image_size", "out_channels", "detail"},
    "segmentation": {"num_classes", "indices", "channels", "auxiliary_channels", "ignore_index", "detail"},
}
_MAKERS: dict[str, Any] = {"detection": make_detector, "segmentation": make_segmenter}


@dataclass(frozen=True)
class DenseModel:
    """A detector or a segmenter.

    Attributes:
        network: torchvision's detector, or an `aptvit.dense.Segmenter`, in eval mode.
        task: "detection" or "segmentation".
        classes: Names of the classes; a detector's labels count from 1.
        inference: Options of a segmenter: ``slide`` for sliding crops, ``crop`` in pixels, ``longer_side`` in pixels
            that images are resized to (0 for no resizing), and ``shrink``, a factor of the sides for baselines.
    """

    network: Any
    task: str
    classes: tuple[str, ...]
    inference: Mapping[str, Any]

    @property
    def model(self) -> AdaptivePatchTransformer:
        """The adaptive model; its ``thresholds`` and ``keep`` can be set at any time."""
        model: AdaptivePatchTransformer = self.network.backbone.model
        return model


def save(
    folder: Path,
    model: AdaptivePatchTransformer,
    task: str,
    classes: Sequence[str],
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    inference: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and configuration.

    Args:
        folder: An existing folder to write to.
        model: The backbone, with its settings.
        task: "detection" or "segmentation".
        classes: Names of the classes.
        options: Arguments of `make_detector` or `make_segmenter` other than the model.
        weights: State dict of the whole network.
        inference: As for `DenseModel`.
    """
    dense = {"task": task, "classes": list(classes), "options": dict(options), "inference": dict(inference or {})}
    config = {**describe(model), "dense": dense}
    save_model(folder, weights, config)


def from_pretrained(folder: Path | str) -> DenseModel:
    """Load a detector or a segmenter from the folder of a training.

    Args:
        folder: ``RUN/model``, or ``RUN``.

    Returns:
        The network in eval mode, with its classes and options.

    Raises:
        ValueError: If the folder holds no detector or segmenter.
    """
    path = _find(folder)
    config, classes, inference = _read_config(path)
    with errors_name(path / _CONFIG):
        network = _build(config, torch.device("cpu"))
        network.load_state_dict(read_weights(path / _WEIGHTS))
        return DenseModel(network.eval(), config["dense"]["task"], classes, inference)


def _read_config(path: Path) -> tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]:
    """The configuration in a folder, which is that of the weights in it, with its classes and options of inference."""
    config = read_settings(path / _CONFIG)
    if "dense" not in config:
        raise ValueError(f"{printable(path)} holds a classifier, no detector or segmenter")
    with errors_name(path / _CONFIG):
        # Without memory at first: a configuration may ask for more than there is.
        check_shapes(_build(config, torch.device("meta")), path / _WEIGHTS)
        return config, _classes(config["dense"]), _inference(config["dense"])


def _build(config: Mapping[str, Any], device: torch.device) -> Any:
    """The network of a configuration, with new weights."""
    dense = config["dense"]
    unknown = dense["options"].keys() - _OPTIONS[dense["task"]]
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is no option of a detector or segmenter")
    model = build(AdaptivePatchTransformer, dict(config), device)
    with device:
        return _MAKERS[dense["task"]](model, **dense["options"])


def _classes(dense: Mapping[str, Any]) -> tuple[str, ...]:
    names = [str(name) for name in dense["classes"]]
    if len(names) != dense["options"]["num_classes"]:
        raise ValueError(f"{len(names)} names for {dense['options']['num_classes']} classes")
    return tuple(names)


def _inference(dense: Mapping[str, Any]) -> dict[str, Any]:
    inference = dict(dense["inference"])
    if dense["task"] == "segmentation" and not (
        isinstance(inference["slide"], bool) and inference["crop"] > 0 and inference["longer_side"] >= 0
    ):
        raise ValueError("inference must have slide, crop in pixels, and longer_side in pixels or 0")
    return inference


def start_from(network: nn.Module, folder: Path | str) -> None:
    """Load the weights of an earlier training; parameters that uniform models do not have may be missing.

    Args:
        network: The network; its weights are set.
        folder: The folder of the earlier training.

    Raises:
        ValueError: If the weights do not fit the network.
    """
    path = _find(folder)
    _read_config(path)
    shapes, state = shapes_of_weights(path / _WEIGHTS), network.state_dict()
    new = {name for name in state.keys() | shapes.keys() if is_new(name)}
    misfits = sorted(
        name
        for name in (state.keys() | shapes.keys()) - new
        if name not in state or name not in shapes or state[name].shape != shapes[name]
    )
    misfits += [name for name in sorted(new & state.keys() & shapes.keys()) if state[name].shape != shapes[name]]
    if misfits:
        raise ValueError(
            f"{printable(path)} does not fit this network ({printable(misfits[0][:100])} differs): use the same model, "
            "size of windows, channels and classes"
        )
    weights = read_weights(path / _WEIGHTS)
    network.load_state_dict({**state, **{name: value for name, value in weights.items() if name in state}})


def _find(folder: Path | str) -> Path:
    for path in (Path(folder), Path(folder) / "model"):
        if (path / _CONFIG).is_file() and (path / _WEIGHTS).is_file():
            return path
    raise ValueError(f"{folder} holds no model: give the folder of a finished training, or model/ inside it")
