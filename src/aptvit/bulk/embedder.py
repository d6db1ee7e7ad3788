"""Images to rows: decoded in threads, packed by a token budget, and what the model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import aptvit
from aptvit.api import load_saved
from aptvit.bulk.listing import Entry, read_entries
from aptvit.data import TokenBudgetBatcher
from aptvit.files.images import ImageError, open_image
from aptvit.hosts.pretrained import evaluation_transform, load_host
from aptvit.measuring.memory import keep_freed_memory

__all__ = ["Decoded", "Embedder", "Options", "data_config", "decode", "settings_of"]

_TOP = 5
Output = Literal["pooled", "map", "predictions"]


@dataclass(frozen=True)
class Options:
    """What to make of images. Rows of one job have one of these.

    Attributes:
        model: timm's name, or a folder that ``save_pretrained`` or a training wrote.
        checkpoint: Weights of a timm model instead of its own.
        settings: As `aptvit.adapt` takes them, for a timm model: ``{"keep": 0.5}``.
        output: ``"pooled"`` features, the feature ``"map"`` of the last block, or the top five ``"predictions"``.
        max_tokens: Of a pack, prefix tokens included.
        dtype: Type to compute in.
    """

    model: str
    checkpoint: str | None = None
    settings: dict[str, Any] | None = None
    output: Output = "pooled"
    max_tokens: int = 8192
    dtype: str = "float32"


@dataclass(frozen=True)
class Decoded:
    """An image that was read, or why it was not.

    Attributes:
        name: Of its row.
        size: (width, height) in pixels, upright.
        pixels: (C, H, W) uint8 as the model reads them.
        error: Empty, or the reason.
    """

    name: str
    size: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None
    error: str = ""


def decode(entry: Entry, content: bytes | Exception, transform: Any) -> Decoded:
    """One image; whatever is wrong with it becomes its error."""
    if isinstance(content, Exception):
        return Decoded(entry.name, error=f"{entry.name}: {' '.join(str(content).split()) or type(content).__name__}")
    try:
        if not content:
            raise ImageError(f"{entry.name}: the file is empty")
        picture = open_image(entry.name, data=content)
        return Decoded(entry.name, picture.size, np.asarray(transform(picture)))
    except Exception as error:  # an image of one pixel's width, say, that a transform cannot resize
        return Decoded(entry.name, error=" ".join(str(error).split()) or type(error).__name__)


class Embedder:
    """A model that turns images into rows.

    Args:
        options: What to make of them.
        device: Where to run.

    Raises:
        ValueError: If there is no such model.
    """

    def __init__(self, options: Options, device: str = "cpu") -> None:
        self.options, self.device = options, device
        if device == "cpu":
            keep_freed_memory()
        dtype = getattr(torch, options.dtype)
        model, data = _load(options)
        self.transform = evaluation_transform(data)
        self.model: Any = model.to(device, dtype).eval().requires_grad_(False)
        if options.output == "predictions" and not self.model.num_classes:
            raise ValueError(f"{options.model} has no classes: --output pooled or map")

    def decoded(self, entries: Sequence[Entry], threads: int) -> Iterator[Decoded]:
        """Entries read and decoded in threads, in order, a few ahead of what is taken."""
        if threads < 2:
            for entry, content in zip(entries, read_entries(entries), strict=True):
                yield decode(entry, content, self.transform)
            return
        with ThreadPoolExecutor(threads) as pool:
            contents = iter(zip(entries, read_entries(entries), strict=True))
            ahead = [pool.submit(decode, *one, self.transform) for one in islice(contents, 4 * threads)]
            while ahead:
                yield ahead.pop(0).result()
                ahead += [pool.submit(decode, *one, self.transform) for one in islice(contents, 1)]

    @torch.inference_mode()
    def rows(self, images: Iterable[Decoded]) -> list[dict[str, Any]]:
        """A row for each image, in order."""
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []  # of the rows whose images can be read

        def readable() -> Iterator[Tensor]:
            for one in images:
                width, height = one.size
                rows.append({"file": one.name, "width": width, "height": height, "error": one.error or None})
                if one.pixels is not None:
                    numbers.append(len(rows) - 1)
                    yield torch.from_numpy(one.pixels).to(self.device, non_blocking=True)  # raw: the model normalises

        for pack in TokenBudgetBatcher(self.model, readable(), self.options.max_tokens):
            layout, values = pack.layout, self._outputs(pack)
            for place, number in enumerate(pack.index):
                grid = layout.grid_sizes[place]
                kept = layout.seqlens[place] - layout.num_prefix_tokens
                told = {"tokens": kept, "uniform_tokens": grid[0] * grid[1]}
                rows[numbers[number]] |= told | {name: value[place] for name, value in values.items()}
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
        shares = self.model.forward_head(features).float().softmax(1)
        best = shares.topk(min(_TOP, shares.shape[1]))
        return {"classes": best.indices.cpu().numpy(), "shares": best.values.cpu().numpy()}


def _load(options: Options) -> tuple[Any, dict[str, Any]]:
    saved = load_saved(options.model)
    if saved is not None:
        if options.settings or options.checkpoint:
            raise ValueError(
                f"{options.model} knows its own weights and patches: leave --checkpoint, --keep and the like out"
            )
        return saved
    host = load_host(options.model, None if options.checkpoint is None else Path(options.checkpoint))
    if host.weights == "random":  # other ones for each worker, and after each new start
        raise ValueError(f"{options.model} has no trained weights at hand: give --checkpoint, or connect to the hub")
    return aptvit.adapt(host.model, **(options.settings or {})), host.data


def data_config(options: Options) -> dict[str, Any]:
    """timm's data configuration of a model."""
    return _load(options)[1]


def settings_of(
    model: str, keep: float | None, thresholds: tuple[float, ...] | None, config: Path | None
) -> dict[str, Any] | None:
    """What `Options.settings` is for a share, thresholds, or a file of `aptvit calibrate`; at most one is set.

    Args:
        model: timm's name, or a folder, whose own settings hold where nothing is set.
        keep: Share of the patch tokens of every image.
        thresholds: From fine to coarse.
        config: As `aptvit.read_config` reads it.
    """
    if config is not None:
        return aptvit.read_config(config)
    if thresholds is not None:
        return {"thresholds": list(thresholds)}
    if keep is not None:
        return {"keep": keep}
    return None if Path(model).is_dir() else {"keep": 0.5}
