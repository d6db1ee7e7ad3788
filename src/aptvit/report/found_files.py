"""What a detector or a segmenter finds in files: a drawing of each, its mask, and what was found as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from aptvit.dense.inference import predict_image
from aptvit.dense.saved import DenseModel
from aptvit.files.images import ImageError, open_image
from aptvit.measuring.progress import Progress, silent
from aptvit.report.drawing import save_png
from aptvit.report.found import draw_found

__all__ = ["find_in_files"]


def find_in_files(
    dense: DenseModel, files: Sequence[Path], out: Path, min_score: float = 0.5, progress: Progress = silent
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a model on image files, and write a drawing of each with its patches.

    Args:
        dense: The detector or segmenter.
        files: Image files.
        out: Folder of the drawings, and of a segmenter's masks.
        min_score: Of boxes that are kept, from 0 to 1.
        progress: Wraps the files.

    Returns:
        For each file that could be read: ``file``, ``tokens``, ``tokens_read``, ``uniform_tokens``, ``drawing``, and
        ``boxes`` (class, score, corners in pixels) or ``mask`` (a PNG with the class of each pixel). Then why the
        others could not be read.

    Raises:
        ValueError: If none can be read, or a drawing cannot be written.
    """
    rows: list[dict[str, Any]] = []
    skipped = []
    for file in progress(files, "images", len(files)):
        try:
            image = open_image(file)
        except ImageError as error:
            skipped.append(str(error))
            continue
        found = predict_image(dense, image, min_score)
        row: dict[str, Any] = {"file": str(file)}
        row |= {name: getattr(found, name) for name in ("tokens", "tokens_read", "uniform_tokens")}
        drawing = save_png(draw_found(image, found, dense.classes), _free(out / f"{file.stem}.png", rows))
        row["drawing"] = str(drawing)
        if found.classes is None:
            row["boxes"] = [
                {"class": dense.classes[label], "score": round(float(score), 4), "box": box.round(1).tolist()}
                for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True)
            ]
        else:
            mask = Image.fromarray(found.classes.astype("uint8" if len(dense.classes) <= 256 else "uint16"))
            row["mask"] = str(save_png(mask, drawing.with_suffix(".mask.png")))
        rows.append(row)
    if not rows:
        raise ValueError(f"none of {len(files)} files can be read as an image; the first: {skipped[0]}")
    return rows, skipped


def _free(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Another name where two images share one."""
    taken, number, free = {row["drawing"] for row in rows}, 1, path
    while str(free) in taken:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
