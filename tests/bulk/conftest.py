"""Images, a checkpoint, and what jobs write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

from aptvit.bulk import Options

__all__ = ["BROKEN", "MODEL", "command", "options", "rows"]

MODEL = "test_vit"  # timm's smallest ViT: 160 pixels, patches of 16
BROKEN = 7  # of the images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images of several formats and sizes, and files that are broken or not images."""
    root = tmp_path_factory.mktemp("images")
    whole = Image.fromarray(data.astronaut())
    for i in range(30):
        image = whole.crop((i * 9, i * 5, i * 9 + 60 + 10 * (i % 7), i * 5 + 50 + 8 * (i % 5)))
        kind = ("jpg", "png", "webp")[i % 3]
        file = root / f"folder{i % 2}" / f"{i:02d}.{kind}"
        file.parent.mkdir(exist_ok=True)
        image.save(file)
    good = (root / "folder0" / "00.jpg").read_bytes()
    (root / "a-empty.jpg").write_bytes(b"")
    (root / "b-cut.jpg").write_bytes(good[: len(good) // 2])
    (root / "c-text.png").write_text("not an image at all")
    (root / "d-noise.jpg").write_bytes(os.urandom(500))
    (root / "e-zeros.webp").write_bytes(bytes(1000))
    (root / "f-folder.jpg").mkdir()
    (root / "f-folder.jpg" / "inside.bmp").write_bytes(b"BM" + bytes(40))
    (root / "g-gigantic.png").write_bytes(b"P6 40000 40000 255\n")  # the header of a PPM of 1.6 billion pixels
    (root / "folder1" / "misnamed.png").write_bytes(good)  # a JPEG
    (root / ".hidden.jpg").write_bytes(good)
    (root / "notes.txt").write_text("no image")
    return root


def rows(out: Path) -> list[dict[str, Any]]:
    dataset = pytest.importorskip("pyarrow.dataset")
    table_rows = dataset.dataset(out).to_table().to_pylist()
    return sorted(table_rows, key=lambda row: row["file"])


def options(checkpoint: Path, **values: Any) -> Options:
    return Options(MODEL, str(checkpoint), **{"settings": {"thresholds": [5.0]}, "max_tokens": 500, **values})


def command(images: Path, checkpoint: Path, out: Path, *more: Any) -> list[str]:
    words = [
        "embed",
        images,
        "--model",
        MODEL,
        "--checkpoint",
        checkpoint,
        "--thresholds",
        "5.0",
        "--part-size",
        4,
    ]
    return [str(word) for word in [*words, "--out", out, *more]]
