"""Pictures of patches, and of the scores behind them, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.budget import Wish, calibrate
from aptvit.compare import Progress
from aptvit.images import ImageError, open_image
from aptvit.patchify import Patchifier
from aptvit.pictures import draw_patches, draw_scores, save_png, side_by_side

__all__ = ["Shown", "ShownPicture", "show_patches"]


@dataclass(frozen=True)
class ShownPicture:
    """A picture that was written, and the tokens of its photo."""

    photo: str
    path: str
    tokens: int
    tokens_uniform: int
    keep_ratio: float


@dataclass(frozen=True)
class Shown:
    """What `show_patches` made."""

    pictures: list[ShownPicture]
    skipped: list[str]
    thresholds: tuple[float, ...] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def show_patches(
    files: Sequence[Path],
    out: Path,
    wish: Wish,
    patch_size: int,
    side: int,
    scorer: str,
    with_scores: bool,
    progress: Progress,
) -> Shown:
    """Write one PNG for each photo. A file that cannot be read is reported and the rest goes on.

    Args:
        files: The photos.
        out: Folder of the pictures.
        wish: How many tokens.
        patch_size: Side of a base patch in pixels.
        side: Longer side in pixels that photos are resized to; both sides are rounded to whole patches.
        scorer: As for `aptvit.adapt`.
        with_scores: Put the score map of each scale beside the patches.
        progress: Wraps long work.

    Raises:
        ValueError: If no file can be read.
    """
    patchifier = Patchifier(patch_size, scorer=scorer, **wish.options())
    photos: dict[Path, Tensor] = {}
    skipped = []
    for path in progress(files, "reading photos", len(files)):
        try:
            photos[path] = _resized(open_image(path, max_side=side), side, patch_size)
        except ImageError as error:
            skipped.append(str(error))
    if not photos:
        raise ValueError(f"none of {len(files)} files can be read as an image; the first: {skipped[0]}")
    if wish.calibrated:
        calibrate(patchifier, list(photos.values()), keep=wish.keep)
    pictures = []
    for path, name in progress(list(zip(photos, _names(photos), strict=True)), "drawing", len(photos)):
        pixels = photos[path].permute(1, 2, 0).numpy()
        layout = patchifier.layout(patchifier.groups([photos[path]]))
        patches = layout.patches(0).numpy()
        panels = [draw_patches(pixels, patches, patch_size)]
        if with_scores:
            ((_, maps),) = patchifier.scores([photos[path]])
            for factor, scores in maps.items():
                panels.append(draw_scores(scores[0].numpy(), pixels.shape[:2], factor * patch_size))
        written = save_png(side_by_side(panels) if len(panels) > 1 else panels[0], out / name)
        uniform = layout.grid_sizes[0][0] * layout.grid_sizes[0][1]
        pictures.append(ShownPicture(str(path), str(written), len(patches), uniform, layout.keep_ratio))
    return Shown(pictures, skipped, patchifier.thresholds)


def _resized(image: Image.Image, side: int, patch_size: int) -> Tensor:
    """(3, H, W) uint8 with the longer side near ``side`` and both sides whole patches."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale / patch_size)) * patch_size for length in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _names(photos: Sequence[Path] | dict[Path, Tensor]) -> list[str]:
    """A file name for each photo's picture; photos of the same name get a number."""
    used: dict[str, int] = {}
    names = []
    for path in photos:
        used[path.stem] = used.get(path.stem, 0) + 1
        names.append(f"{path.stem}.png" if used[path.stem] == 1 else f"{path.stem}-{used[path.stem]}.png")
    return names
