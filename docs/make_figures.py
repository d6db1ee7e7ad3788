"""Draw the paper's picture figures on photos that scikit-image and scikit-learn install: python docs/make_figures.py

Figure 8, thresholds on photos; figure 9, augmentations and their token counts; figure 10, scorers at equal tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import Mixup, create_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from aptvit.files.sample_photos import sample_photos
from aptvit.patching.patchifier import Patchifier
from aptvit.report.drawing import draw_patches

OUT = Path(__file__).parent / "images"
SIDE, PATCH, CELL = 384, 16, 232
THRESHOLDS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5)
PAPER = (5.5, 4.0)


def main() -> None:
    photos = {name: _square(photo) for name, photo in sample_photos().items()}
    chosen = {name: photos[name] for name in ("china", "astronaut", "rocket", "motorcycle")}
    _save(thresholds_on_photos(chosen), "thresholds.jpg")
    _save(scorers_on_photos(chosen), "scorers.jpg")
    _save(augmentations(photos), "augmentations.jpg")


def thresholds_on_photos(photos: dict[str, Tensor]) -> Image.Image:
    """One row for each photo, one column for each threshold of both coarse sizes."""
    cells = []
    for pixels in photos.values():
        cutters = [Patchifier(PATCH, thresholds=(threshold,) * 2) for threshold in THRESHOLDS]
        cells.append([_cut(pixels, cutter) for cutter in cutters])
    return _grid(cells, [f"{threshold:.1f} bits" for threshold in THRESHOLDS])


def scorers_on_photos(photos: dict[str, Tensor]) -> Image.Image:
    """One row for each photo, one column for each scorer, all with half of the tokens."""
    scorers = ("entropy", "laplacian", "upsample")
    cells = [
        [_cut(pixels, Patchifier(PATCH, keep=0.5, scales=3, scorer=scorer)) for scorer in scorers]
        for pixels in photos.values()
    ]
    return _grid(cells, scorers)


def augmentations(photos: dict[str, Tensor], draws: int = 40) -> Image.Image:
    """Augmentations of two photos, and what share of the tokens is kept on average over many draws of all photos."""
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    ways = _augmentations(list(photos.values()))
    cutter = Patchifier(PATCH, thresholds=PAPER)
    labels = []
    for name, augment in ways.items():
        batch = torch.stack([augment(pixels) for pixels in photos.values() for _ in range(draws)])
        kept = [cutter(cutter.groups(part)).keep_ratio for part in batch.split(32)]
        weights = [len(part) for part in batch.split(32)]
        labels.append(f"{name}: {np.average(kept, weights=weights):.0%} kept")
    cells = [[_cut(way(photos[name]), cutter) for way in ways.values()] for name in ("astronaut", "motorcycle")]
    return _grid(cells, labels)


def _augmentations(photos: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What recipes for training use, as timm makes it. (3, H, W) uint8 -> the same"""
    crop = create_transform((3, SIDE, SIDE), is_training=True, color_jitter=None, hflip=0.5, use_prefetcher=True)
    jitter = create_transform((3, SIDE, SIDE), is_training=True, scale=(1, 1), ratio=(1, 1), color_jitter=0.4, hflip=0)
    rand_augment = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 100, "img_mean": (124, 116, 104)})
    erase = RandomErasing(probability=1, mode="pixel", max_area=1 / 3, device="cpu")
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def normalised(pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - mean) / std

    def raw(image: Tensor) -> Tensor:
        return ((image * std + mean) * 255).round().clamp(0, 255).byte()

    def mixed(pixels: Tensor, **options: float) -> Tensor:
        pair = torch.stack([normalised(pixels), normalised(random.choice(photos))])
        return raw(Mixup(**options, num_classes=2)(pair, torch.tensor([0, 1]))[0][0])

    return {
        "none": lambda pixels: pixels,
        "crop + flip": lambda pixels: torch.as_tensor(crop(_image(pixels))),
        "colour": lambda pixels: raw(jitter(_image(pixels))),
        "RandAug": lambda pixels: _pixels(rand_augment(_image(pixels))),
        "erasing": lambda pixels: raw(erase(normalised(pixels))),
        "mixup": lambda pixels: mixed(pixels, mixup_alpha=0.8, cutmix_alpha=0.0),
        "cutmix": lambda pixels: mixed(pixels, mixup_alpha=0.0, cutmix_alpha=1.0),
    }


def _cut(pixels: Tensor, cutter: Patchifier) -> tuple[Image.Image, str]:
    layout = cutter(cutter.groups([pixels]))
    drawn = draw_patches(pixels.permute(1, 2, 0).numpy(), layout.patches(0).numpy(), PATCH)
    uniform = (SIDE // PATCH) ** 2
    return drawn, f"{layout.num_patches} tokens ({layout.num_patches / uniform:.0%})"


def _grid(rows: list[list[tuple[Image.Image, str]]], headings: list[str] | tuple[str, ...]) -> Image.Image:
    """Pictures in rows and columns, a heading above each column and a caption below each picture."""
    gap, line = 8, 30
    width = len(headings) * (CELL + gap) + gap
    canvas = Image.new("RGB", (width, line + len(rows) * (CELL + line)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
    for i, heading in enumerate(headings):
        draw.text((gap + i * (CELL + gap) + CELL // 2, line // 2), heading, "black", font, anchor="mm")
        for j, row in enumerate(rows):
            picture, caption = row[i]
            left, top = gap + i * (CELL + gap), line + j * (CELL + line)
            canvas.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
            draw.text((left + CELL // 2, top + CELL + line // 2), caption, (70, 70, 70), font, anchor="mm")
    return canvas


def _square(photo: np.ndarray) -> Tensor:
    """The middle of a photo as (3, SIDE, SIDE) uint8."""
    image = Image.fromarray(photo)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return _pixels(image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _save(picture: Image.Image, name: str) -> None:
    picture.save(OUT / name, quality=78)
    print(OUT / name)


if __name__ == "__main__":
    main()
