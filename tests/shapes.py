"""Made-up pictures of coloured shapes, as folders of masks and of boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((200, 40, 40), (40, 60, 200))


def draw(seed: int, width: int = 160, height: int = 128) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[int]]]]:
    """A picture, its mask (0 for the background, then 1 and 2), and (class, corners) of its shapes."""
    rng = np.random.default_rng(seed)
    image = rng.normal(128, 4, (height, width, 1)).repeat(3, axis=2)
    image[:, : width // 3] += rng.normal(0, 40, (height, width // 3, 1))  # a busy part
    mask = np.zeros((height, width), dtype=np.uint8)
    shapes = []
    for kind, place in enumerate(rng.permutation(2)):
        side = int(rng.integers(40, 60))
        left = int(place * width // 2 + rng.integers(0, width // 2 - side))
        top = int(rng.integers(0, height - side))
        image[top : top + side, left : left + side] = COLOURS[kind]
        mask[top : top + side, left : left + side] = kind + 1
        shapes.append((kind, [left, top, left + side, top + side]))
    return image.clip(0, 255).astype(np.uint8), mask, shapes


def masks(root: Path, number: int, aside: int) -> Path:
    """``train``, ``trainannot``, ``val``, ``valannot``."""
    for i in range(number + aside):
        split = "train" if i < number else "val"
        image, mask, _ = draw(i)
        for folder, pixels in ((split, image), (f"{split}annot", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{i:02d}.png")
    return root


def unsplit(root: Path, number: int) -> Path:
    """``images``, ``masks``."""
    for i in range(number):
        for folder, pixels in zip(("images", "masks"), draw(i)[:2], strict=True):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{i:02d}.png")
    return root


def boxes(root: Path, number: int, aside: int) -> Path:
    """Pascal VOC's form; the last picture to train on holds nothing, and one box has no area."""
    for folder in ("JPEGImages", "Annotations", "ImageSets"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = [f"{i:02d}" for i in range(number + aside)]
    for i, name in enumerate(names):
        image, _, shapes = draw(i)
        if i == number - 1:
            image, shapes = np.full_like(image, 128), []
        Image.fromarray(image).save(root / "JPEGImages" / f"{name}.png")
        corners = [(("red", "blue")[kind], (a + 1, b + 1, c, d)) for kind, (a, b, c, d) in shapes]
        corners += [("red", (9, 9, 5, 5))] if i == 0 else []
        rows = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
            "</bndbox></object>"
            for kind, (a, b, c, d) in corners
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{rows}</annotation>")
    (root / "ImageSets" / "train.txt").write_text("\n".join(names[:number]))
    (root / "ImageSets" / "val.txt").write_text("\n".join(names[number:]))
    return root
