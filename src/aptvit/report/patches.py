"""Drawings of patches and scores, with a model or without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from aptvit.patching.scoring import to_gray
from aptvit.report.drawing import draw_patches, draw_scores, save_png, side_by_side
from aptvit.report.why import as_text, mark_patch

if TYPE_CHECKING:
    from aptvit.measuring.progress import Progress
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["Drawings", "ImageDrawing", "draw_layout", "show", "show_patches"]


def show(
    model: AdaptivePatchTransformer, image: Tensor | np.ndarray | Image.Image | Path | str, scores: bool = False
) -> Image.Image:
    """Draw the patches of an image, as a model chooses them. Notebooks show the result of the last line of a cell.

    Args:
        model: The adaptive model.
        image: (C, H, W), the input of the model; or a file, a PIL image or (H, W, 3) uint8, which are resized: the
            longer side to that of the model's input, both sides to whole patches. Numbers of channels other than three
            are drawn in gray: their mean.
        scores: Draw the score map of each larger patch size to the right.

    Returns:
        The drawing, enlarged so that the longer side of the image is at least 768 pixels.

    Raises:
        ValueError: If the image does not fit the model, or cannot be read.
    """
    device = model.adapter.device
    x = image if isinstance(image, Tensor) else _input_of(model, image)
    if x.ndim == 4 and len(x) == 1:
        x = x[0]
    if x.ndim != 3:
        raise ValueError(f"show takes one image, (C, H, W), not a tensor of shape {tuple(x.shape)}")
    return side_by_side(draw_layout(model.patchifier, x.to(device), scores)[0])


def _input_of(model: AdaptivePatchTransformer, image: np.ndarray | Image.Image | Path | str) -> Tensor:
    """(C, H, W) uint8, resized to whole patches, or whole windows of patches."""
    mode = {1: "L", 3: "RGB"}.get(model.adapter.in_chans)
    if mode is None:
        raise ValueError(f"this model reads {model.adapter.in_chans} channels: show it a tensor (C, H, W)")
    if isinstance(image, (str, Path)):
        image = open_image(image)
    elif isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    cut = model.patchifier.cut_size
    return _resized(
        image.convert(mode), max(cut or (*image.size, model.patch_size)), model.patch_size * (model.window_size or 1)
    )


@torch.no_grad()
def draw_layout(patchifier: Patchifier, image: Tensor, with_scores: bool) -> tuple[list[Image.Image], PatchLayout]:
    """Draw the patches of an image and, in drawings of their own, the scores of each larger patch size.

    Args:
        patchifier: The patchifier that chooses the patches.
        image: (C, H, W).
        with_scores: Whether scores are drawn.

    Returns:
        The drawing of the patches, then those of the scores from fine to coarse; and the layout.

    Raises:
        ValueError: If the image does not fit the patchifier.
    """
    (group,) = patchifier.groups([image])
    layout = patchifier([group])
    rows, cols = layout.grid_sizes[0]
    size = patchifier.patch_size
    cropped = patchifier.normalization.pixels(group.images)[0, :, : rows * size, : cols * size]
    if len(cropped) != 3:
        cropped = to_gray(cropped[None]).expand(3, -1, -1)
    pixels = cropped.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    patches = draw_patches(pixels, layout.patches(0).cpu().numpy(), size)
    if not with_scores:
        return [patches], layout
    ((_, maps),) = patchifier.scores([image])
    scores = [draw_scores(part[0].cpu().numpy(), pixels.shape[:2], factor * size) for factor, part in maps.items()]
    return [patches, *scores], layout


@dataclass(frozen=True)
class ImageDrawing:
    """A file with a drawing of an image, and the tokens of the image.

    Attributes:
        source: File of the image.
        path: File of the drawing.
        tokens: Patch tokens of the image.
        tokens_uniform: Patch tokens of the uniform grid.
        keep_ratio: ``tokens`` over ``tokens_uniform``.
        explanation: Explanation of the patch around a pixel, in coordinates of the resized image; None without a pixel.
    """

    source: str
    path: str
    tokens: int
    tokens_uniform: int
    keep_ratio: float
    explanation: Explanation | None = None

    @property
    def explanation_text(self) -> str:
        """The explanation as text; empty without a pixel."""
        return "" if self.explanation is None else as_text(self.explanation, self.source)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        names = ("path", "tokens", "tokens_uniform", "keep_ratio")
        values = {"photo": self.source, **{name: getattr(self, name) for name in names}}
        return values if self.explanation is None else {**values, "why": self.explanation.to_dict()}


@dataclass(frozen=True)
class Drawings:
    """The result of `show_patches`.

    Attributes:
        images: A drawing for each image.
        skipped: Messages for files that could not be read.
        thresholds: Thresholds of the patchifier, from fine to coarse; None where every image keeps a share.
    """

    images: list[ImageDrawing]
    skipped: list[str]
    thresholds: tuple[float, ...] | None

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        drawings = [drawing.to_dict() for drawing in self.images]
        return {"pictures": drawings, "skipped": self.skipped, "thresholds": self.thresholds}


def show_patches(
    files: Sequence[Path],
    out: Path,
    target: Target,
    patch_size: int,
    side: int,
    scorer: str,
    with_scores: bool,
    progress: Progress,
    pixel: tuple[int, int] | None = None,
) -> Drawings:
    """Write a PNG with the patches of each image. Files that cannot be read are skipped and reported.

    Args:
        files: Image files.
        out: Folder of the drawings.
        target: Thresholds, or the share of the tokens.
        patch_size: Side of a base patch in pixels.
        side: Longer side in pixels that images are resized to; both sides are rounded to whole patches.
        scorer: As for `aptvit.adapt`.
        with_scores: Draw the score map of each scale to the right of the patches.
        progress: Wraps long work.
        pixel: (x, y), column and row of a pixel in each upright image: its patch is marked and explained.

    Raises:
        ValueError: If no file can be read, or the pixel is outside an image.
    """
    patchifier = Patchifier(patch_size, scorer=scorer, **target.options())

    def read(path: Path) -> tuple[Tensor, tuple[int, int]]:
        image = open_image(path, max_side=side if pixel is None else None)
        return _resized(image, side, patch_size), image.size

    loaded, skipped = read_each(files, read, progress)
    images = {path: image for path, (image, _) in loaded}
    sizes = {path: size for path, (_, size) in loaded}  # (width, height) of the files
    if target.calibrated:
        calibrate(patchifier, list(images.values()), keep=target.keep)
    drawings = []
    for path, name in progress(list(zip(images, _names(images), strict=True)), "drawing", len(images)):
        panels, layout = draw_layout(patchifier, images[path], with_scores)
        explanation = None
        if pixel is not None:
            explanation = _explained(patchifier, images[path], path, sizes[path], pixel)
            panels[0] = mark_patch(panels[0], explanation.patch, images[path].shape[2])
        written = save_png(side_by_side(panels), out / name)
        rows, cols = layout.grid_sizes[0]
        tokens = layout.num_patches, rows * cols, layout.keep_ratio
        drawings.append(ImageDrawing(str(path), str(written), *tokens, explanation))
    return Drawings(drawings, skipped, patchifier.budget.thresholds)


def _explained(
    patchifier: Patchifier, image: Tensor, path: Path, size: tuple[int, int], pixel: tuple[int, int]
) -> Explanation:
    """The explanation of the patch around a pixel of a file, in coordinates of the resized image."""
    (x, y), (width, height) = pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"pixel ({x}, {y}) is outside {path} of {width} x {height} pixels: x, y count from 0")
    return explain(patchifier, image, x * image.shape[2] // width, y * image.shape[1] // height)


def _resized(image: Image.Image, side: int, patch_size: int) -> Tensor:
    """(C, H, W) uint8 with the longer side near ``side`` and both sides whole patches."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale / patch_size)) * patch_size for length in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.atleast_3d(np.array(resized))).permute(2, 0, 1)


def _names(paths: Iterable[Path]) -> list[str]:
    """A file name for the drawing of each image; images of the same name get a number."""
    used: dict[str, int] = {}
    names = []
    for path in paths:
        used[path.stem] = used.get(path.stem, 0) + 1
        names.append(f"{path.stem}.png" if used[path.stem] == 1 else f"{path.stem}-{used[path.stem]}.png")
    return names
