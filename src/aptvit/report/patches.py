"""Pictures of patches, and of the scores behind them: of a model, or without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptvit.calibration.calibrator import Target, calibrate
from aptvit.files.images import open_image, read_each
from aptvit.patching.explanation import Explanation, explain
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier
from aptvit.report.drawing import draw_patches, draw_scores, save_png, side_by_side
from aptvit.report.why import as_text, mark_patch

if TYPE_CHECKING:
    from aptvit.measuring.progress import Progress
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["Shown", "ShownPicture", "draw_layout", "show", "show_patches"]


def show(
    model: AdaptivePatchTransformer, image: Tensor | np.ndarray | Image.Image | Path | str, scores: bool = False
) -> Image.Image:
    """An image with the patches that a model cuts it into. Notebooks show it where it stands last in a cell.

    Args:
        model: The adaptive model.
        image: (C, H, W) as the model takes it; or a picture, as a file, a PIL image or (H, W, 3) uint8, which is
            resized: its longer side to that of the model's own input, both sides to whole patches.
        scores: Put the score map of each larger size beside it.

    Raises:
        ValueError: If the image does not fit the model, or cannot be read.
    """
    device = model.adapter.device
    x = image if isinstance(image, Tensor) else _as_taken(model, image)
    if x.ndim == 4 and len(x) == 1:
        x = x[0]
    if x.ndim != 3:
        raise ValueError(f"show takes one image, (C, H, W), not a tensor of shape {tuple(x.shape)}")
    return side_by_side(draw_layout(model.patchifier, x.to(device), scores)[0])


def _as_taken(model: AdaptivePatchTransformer, image: np.ndarray | Image.Image | Path | str) -> Tensor:
    if isinstance(image, (str, Path)):
        image = open_image(image)
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    cut = model.patchifier.cut_size
    return _resized(
        image.convert("RGB"), max(cut or (*image.size, model.patch_size)), model.patch_size * (model.window_size or 1)
    )


@torch.no_grad()
def draw_layout(patchifier: Patchifier, image: Tensor, with_scores: bool) -> tuple[list[Image.Image], PatchLayout]:
    """One image with its patches, then the scores of each larger size that they were chosen by; and the layout.

    Args:
        patchifier: What cuts it.
        image: (C, H, W).
        with_scores: Whether scores are drawn.

    Raises:
        ValueError: If the image does not fit.
    """
    (group,) = patchifier.groups([image])
    layout = patchifier([group])
    rows, cols = layout.grid_sizes[0]
    size = patchifier.patch_size
    whole = patchifier.normalization.pixels(group.images)[0, :, : rows * size, : cols * size]
    pixels = whole.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    patches = draw_patches(pixels, layout.patches(0).cpu().numpy(), size)
    if not with_scores:
        return [patches], layout
    ((_, maps),) = patchifier.scores([image])
    scores = [draw_scores(part[0].cpu().numpy(), pixels.shape[:2], factor * size) for factor, part in maps.items()]
    return [patches, *scores], layout


@dataclass(frozen=True)
class ShownPicture:
    """A drawing that was written, and the tokens of its image.

    Attributes:
        photo: File of the image.
        path: File of the drawing.
        tokens: Patch tokens of the image.
        tokens_uniform: Of the uniform grid.
        keep_ratio: The one over the other.
        why: Why a pixel is in its patch, if that was asked; coordinates are those of the image as it is cut.
    """

    photo: str
    path: str
    tokens: int
    tokens_uniform: int
    keep_ratio: float
    why: Explanation | None = None

    @property
    def why_text(self) -> str:
        """The same for people; empty if it was not asked."""
        return "" if self.why is None else as_text(self.why, self.photo)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: getattr(self, name) for name in ("photo", "path", "tokens", "tokens_uniform", "keep_ratio")}
        return values if self.why is None else {**values, "why": self.why.to_dict()}


@dataclass(frozen=True)
class Shown:
    """What `show_patches` made."""

    pictures: list[ShownPicture]
    skipped: list[str]
    thresholds: tuple[float, ...] | None

    def to_dict(self) -> dict[str, Any]:
        pictures = [picture.to_dict() for picture in self.pictures]
        return {"pictures": pictures, "skipped": self.skipped, "thresholds": self.thresholds}


def show_patches(
    files: Sequence[Path],
    out: Path,
    wish: Target,
    patch_size: int,
    side: int,
    scorer: str,
    with_scores: bool,
    progress: Progress,
    why: tuple[int, int] | None = None,
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
        why: (x, y), column and row of a pixel in each image file, upright: explains its patch and marks it.

    Raises:
        ValueError: If no file can be read, or the pixel is outside an image.
    """
    patchifier = Patchifier(patch_size, scorer=scorer, **wish.options())

    def read(path: Path) -> tuple[Tensor, tuple[int, int]]:
        image = open_image(path, max_side=None if why else side)
        return _resized(image, side, patch_size), image.size

    loaded, skipped = read_each(files, read, progress)
    photos = {path: pixels for path, (pixels, _) in loaded}
    sizes = {path: size for path, (_, size) in loaded}  # (width, height) of the files
    if wish.calibrated:
        calibrate(patchifier, list(photos.values()), keep=wish.keep)
    pictures = []
    for path, name in progress(list(zip(photos, _names(photos), strict=True)), "drawing", len(photos)):
        panels, layout = draw_layout(patchifier, photos[path], with_scores)
        explanation = None
        if why is not None:
            explanation = _explained(patchifier, photos[path], path, sizes[path], why)
            panels[0] = mark_patch(panels[0], explanation.patch, photos[path].shape[2])
        written = save_png(side_by_side(panels), out / name)
        rows, cols = layout.grid_sizes[0]
        tokens = layout.num_patches, rows * cols, layout.keep_ratio
        pictures.append(ShownPicture(str(path), str(written), *tokens, explanation))
    return Shown(pictures, skipped, patchifier.budget.thresholds)


def _explained(
    patchifier: Patchifier, image: Tensor, path: Path, size: tuple[int, int], pixel: tuple[int, int]
) -> Explanation:
    """Why a pixel of a file is in its patch, in coordinates of the resized image."""
    (x, y), (width, height) = pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"pixel ({x}, {y}) is outside {path} of {width} x {height} pixels: x, y count from 0")
    return explain(patchifier, image, x * image.shape[2] // width, y * image.shape[1] // height)


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
