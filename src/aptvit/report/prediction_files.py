"""The predictions of a detector or a segmenter for image files: drawings, masks, and values for JSON."""

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
from aptvit.report.predictions import draw_prediction

__all__ = ["predict_files"]


def predict_files(
    dense: DenseModel,
    files: Sequence[Path],
    out: Path,
    min_score: float = 0.5,
    progress: Progress = silent,
    max_side: int | None = None,
    tile: int | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a detector or a segmenter on image files, and write a drawing of each with its patches.

    Args:
        dense: The detector or segmenter.
        files: Image files.
        out: Folder of the drawings and of a segmenter's masks.
        min_score: Least score of a box, from 0 to 1.
        progress: Wraps the files, or the tiles and crops of a single file.
        max_side: As for `aptvit.dense.inference.predict_image`.
        tile: As for `aptvit.dense.inference.predict_image`.

    Returns:
        For each file that could be read: ``file``, its ``size`` and the ``read_size`` of the image or of a tile (width,
        height), ``num_tiles``, ``tokens``, ``tokens_read``, ``uniform_tokens``, ``drawing``, and
        ``boxes`` (class, score, corners in pixels) or ``mask`` (a PNG with the class of each pixel). And a message for
        each file that could not be read.

    Raises:
        ValueError: If no file can be read, or a drawing cannot be written.
    """
    rows: list[dict[str, Any]] = []
    skipped = []
    outer, inner = (silent, progress) if len(files) == 1 else (progress, silent)
    for file in outer(files, "images", len(files)):
        try:
            image = open_image(file)
        except ImageError as error:
            skipped.append(str(error))
            continue
        prediction = predict_image(dense, image, min_score, max_side, tile, inner)
        row: dict[str, Any] = {"file": str(file), "size": list(image.size), "read_size": [*prediction.read_size[::-1]]}
        row |= {name: getattr(prediction, name) for name in ("num_tiles", "tokens", "tokens_read", "uniform_tokens")}
        path = _unused(out / f"{file.stem}.png", rows)
        drawing = save_png(draw_prediction(image, prediction, dense.classes), path)
        row["drawing"] = str(drawing)
        if prediction.classes is None:
            row["boxes"] = [
                {"class": dense.classes[label], "score": round(float(score), 4), "box": box.round(1).tolist()}
                for box, label, score in zip(prediction.boxes, prediction.labels, prediction.scores, strict=True)
            ]
        else:
            kind = "uint8" if len(dense.classes) <= 256 else "uint16"
            mask = Image.fromarray(prediction.classes.astype(kind, copy=False))
            row["mask"] = str(save_png(mask, drawing.with_suffix(".mask.png")))
        rows.append(row)
    if not rows:
        raise ValueError(f"none of {len(files)} files can be read; the first: {skipped[0]}")
    return rows, skipped


def _unused(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The path, with a number appended to its stem if a drawing of another image has it."""
    used, number, unused = {row["drawing"] for row in rows}, 1, path
    while str(unused) in used:
        number += 1
        unused = path.with_stem(f"{path.stem}-{number}")
    return unused
