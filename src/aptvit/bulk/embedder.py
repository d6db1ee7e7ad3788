"""Run a model on images: decode them in threads, pack them up to a token budget, return a row for each image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor

import aptvit
from aptvit.api import find_saved, load_saved
from aptvit.bulk.listing import Entry, read_entries
from aptvit.data import TokenBudgetBatcher
from aptvit.files.images import ImageError, open_image
from aptvit.hosts.pretrained import class_names, evaluation_transform, load_host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.storage.agreement import digest_tensors, digest_texts
from aptvit.storage.writing import digest_file

__all__ = [
    "DecodedImage",
    "Embedder",
    "Loaded",
    "Options",
    "adaptation_settings",
    "decode",
    "digest_weights",
    "files_of_weights",
    "load",
]

_NUM_PREDICTIONS = 5
_FILES = (constants.CONFIG_NAME, constants.SAFETENSORS_SINGLE_FILE)
Output = Literal["pooled", "map", "predictions"]


@dataclass(frozen=True)
class Options:
    """The model of a job and the output that is stored. All rows of a job have the same options.

    Attributes:
        model: Name of a timm model, or a folder that ``save_pretrained`` or a training wrote.
        checkpoint: File with weights of the timm model, in place of timm's pretrained weights.
        settings: Options of `aptvit.adapt` for a timm model, such as ``{"keep": 0.5}``.
        output: ``"pooled"`` features, the feature ``"map"`` of the last block, or the top five ``"predictions"``.
        max_tokens: Largest number of tokens in a pack, prefix tokens included.
        dtype: Name of the torch type to compute in.
    """

    model: str
    checkpoint: str | None = None
    settings: dict[str, Any] | None = None
    output: Output = "pooled"
    max_tokens: int = 8192
    dtype: str = "float32"


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image, or the reason why an image cannot be decoded.

    Attributes:
        name: Name of the image in its row.
        size: (width, height) in pixels, upright; (0, 0) if the image cannot be decoded.
        pixels: (C, H, W) uint8, resized by the model's evaluation transform; None if the image cannot be decoded.
        error: The reason; empty if there is none.
    """

    name: str
    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None
    error: str = ""


def decode(entry: Entry, content: bytes | Exception, transform: Any) -> DecodedImage:
    """Decode an image. Errors are not raised but returned in ``error``.

    Args:
        entry: The place of the image.
        content: Bytes of the file, or the exception from reading it.
        transform: Evaluation transform of the model, from a PIL image to (C, H, W) uint8.
    """
    if isinstance(content, Exception):
        return DecodedImage(
            entry.name, error=f"{entry.name}: {' '.join(str(content).split()) or type(content).__name__}"
        )
    try:
        if not content:
            raise ImageError(f"{entry.name}: the file is empty")
        image = open_image(entry.name, data=content)
        return DecodedImage(entry.name, image.size, np.asarray(transform(image)))
    except Exception as error:  # for example an image of width 1 that the transform cannot resize
        return DecodedImage(entry.name, error=" ".join(str(error).split()) or type(error).__name__)


Loaded = tuple[Any, dict[str, Any]]  # an adaptive model, and timm's data configuration of it


class Embedder:
    """A model that computes a row for each image.

    Args:
        options: The model and the output to compute.
        device: Torch device to run on.
        loaded: The model, if it is loaded already; it is moved to the device.

    Raises:
        ValueError: If the model does not exist, has no trained weights, or has no classes to predict.
    """

    def __init__(self, options: Options, device: str = "cpu", loaded: Loaded | None = None) -> None:
        self.options, self.device = options, device
        if device == "cpu":
            keep_freed_memory()
        dtype = getattr(torch, options.dtype)
        model, data = load(options) if loaded is None else loaded
        self.transform = evaluation_transform(data)
        self.model: Any = model.to(device, dtype).eval().requires_grad_(False)
        names = class_names(self.model)
        self.names = None if names is None else np.array(names, dtype=object)
        if options.output == "predictions" and not self.model.num_classes:
            raise ValueError(f"{options.model} has no classes: --output pooled or map")

    def decoded(self, entries: Sequence[Entry], threads: int) -> Iterator[DecodedImage]:
        """Read and decode images in threads, in order, up to four images per thread in advance.

        Args:
            entries: The places of the images.
            threads: Number of threads; below 2, images are decoded in the calling thread.
        """
        if threads < 2:
            for entry, content in zip(entries, read_entries(entries), strict=True):
                yield decode(entry, content, self.transform)
            return
        with ThreadPoolExecutor(threads) as pool:
            contents = iter(zip(entries, read_entries(entries), strict=True))
            ahead = [pool.submit(decode, *item, self.transform) for item in islice(contents, 4 * threads)]
            while ahead:
                yield ahead.pop(0).result()
                ahead += [pool.submit(decode, *item, self.transform) for item in islice(contents, 1)]

    @torch.inference_mode()
    def rows(self, images: Iterable[DecodedImage]) -> list[dict[str, Any]]:
        """Compute a row for each image, in order.

        Args:
            images: Decoded images; rows of those with an error have no outputs.

        Returns:
            Rows with ``file``, ``width``, ``height``, ``error``, ``tokens`` and ``uniform_tokens`` (patch tokens of
            the adaptive and of the uniform model), and the output: ``feature`` (D,), ``map`` (D, h, w), or ``classes``
            and ``shares`` (5,) for the top five classes and their probabilities; and ``names`` (5,), if there are any.
        """
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []  # of the rows whose images were decoded

        def decoded_pixels() -> Iterator[Tensor]:
            for image in images:
                width, height = image.size
                rows.append({"file": image.name, "width": width, "height": height, "error": image.error or None})
                if image.pixels is not None:
                    numbers.append(len(rows) - 1)
                    yield torch.from_numpy(image.pixels).to(self.device, non_blocking=True)  # the model normalises

        for pack in TokenBudgetBatcher(self.model, decoded_pixels(), self.options.max_tokens):
            layout, values = pack.layout, self._outputs(pack)
            for position, number in enumerate(pack.index):
                grid = layout.grid_sizes[position]
                kept = layout.seqlens[position] - layout.num_prefix_tokens
                counts = {"tokens": kept, "uniform_tokens": grid[0] * grid[1]}
                rows[numbers[number]] |= counts | {name: value[position] for name, value in values.items()}
        return rows

    def _outputs(self, pack: Any) -> dict[str, np.ndarray]:
        if self.options.output == "map":
            (maps,) = self.model.forward_intermediates(
                pack.images, 1, norm=True, intermediates_only=True, layout=pack.layout
            )
            return {"map": maps.float().cpu().numpy()}
        features = self.model.forward_features(pack.images, layout=pack.layout)
        if self.options.output == "pooled":
            return {"feature": self.model.forward_head(features, pre_logits=True).float().cpu().numpy()}
        probabilities = self.model.forward_head(features).float().softmax(1)
        best = probabilities.topk(min(_NUM_PREDICTIONS, probabilities.shape[1]))
        predictions = {"classes": best.indices.cpu().numpy(), "shares": best.values.cpu().numpy()}
        return predictions if self.names is None else {**predictions, "names": self.names[predictions["classes"]]}


def load(options: Options) -> Loaded:
    """Load the model of a job, and timm's data configuration of it.

    Args:
        options: The model.

    Raises:
        ValueError: If the model does not exist or has no trained weights.
    """
    saved = load_saved(options.model)
    if saved is not None:
        if options.settings or options.checkpoint:
            raise ValueError(
                f"{options.model} is a saved model with weights and thresholds: leave out --checkpoint, --keep, "
                "--thresholds and --config"
            )
        return saved
    host = load_host(options.model, None if options.checkpoint is None else Path(options.checkpoint))
    if host.weights == "random":  # every worker, and every restart, would draw different ones
        raise ValueError(f"{options.model} has no trained weights on this machine: give --checkpoint, or go online")
    return aptvit.adapt(host.model, **(options.settings or {})), host.data


def digest_weights(options: Options, model: Any) -> str:
    """Digest of the weights and the configuration of the model of a job, in hexadecimal digits.

    Args:
        options: The model.
        model: The loaded model, whose weights count if they are not from files that the options name.
    """
    files = _files_of(options)
    if not files:
        return digest_tensors(model.state_dict())
    return digest_file(files[0])[:16] if find_saved(options.model) is None else digest_texts(map(digest_file, files))


def files_of_weights(options: Options) -> list[tuple[str, int, int, int]]:
    """Name, number, size and time of the last change of the files that a model is read from, to notice new ones."""
    states = [(file.name, file.stat()) for file in _files_of(options)]
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]


def _files_of(options: Options) -> list[Path]:
    saved = find_saved(options.model)
    if saved is not None:
        return [file for file in sorted(saved.iterdir()) if file.name in _FILES]
    checkpoint = None if options.checkpoint is None else Path(options.checkpoint)
    return [checkpoint] if checkpoint is not None and checkpoint.is_file() else []


def adaptation_settings(
    model: str, keep: float | None, thresholds: tuple[float, ...] | None, config: Path | None
) -> dict[str, Any] | None:
    """Return `Options.settings` for the options of a command, of which at most one is set.

    Args:
        model: Name of a timm model, or the folder of a saved model.
        keep: Share of the patch tokens that every image keeps.
        thresholds: Thresholds from fine to coarse.
        config: File that `aptvit calibrate` wrote.

    Returns:
        Options of `aptvit.adapt`. If no option is set, None for a saved model and ``{"keep": 0.5}`` otherwise.
    """
    if config is not None:
        return aptvit.read_config(config)
    if thresholds is not None:
        return {"thresholds": list(thresholds)}
    if keep is not None:
        return {"keep": keep}
    return None if Path(model).is_dir() else {"keep": 0.5}
