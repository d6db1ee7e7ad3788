"""`aptvit detect` and `aptvit segment`: run a trained detector or segmenter on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.options import (
    DeviceOption,
    ImagesArgument,
    JsonOption,
    OutOption,
    ProgressBars,
    RunOption,
    check_run,
    check_writable,
    checked_device,
    finish,
    print_json,
    print_line,
)


def detect(
    images: ImagesArgument,
    run: RunOption = None,
    min_score: Annotated[float, typer.Option(help="Leave out boxes with lower scores.", min=0, max=1)] = 0.5,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find objects in images. Writes a drawing of each image with its boxes and, next to it, its patches.

    Example: `aptvit detect holiday/ --run detector`
    """
    _find("detection", images, run, min_score, out or Path("detect"), device, as_json)


def segment(
    images: ImagesArgument,
    run: RunOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the class of each pixel of images. Writes a mask of classes for each image, and a drawing with its patches.

    Example: `aptvit segment street.jpg --run segmenter`
    """
    _find("segmentation", images, run, 0.0, out or Path("segment"), device, as_json)


def _find(
    task: str, images: list[Path], run: Path | None, min_score: float, out: Path, device: str | None, as_json: bool
) -> None:
    from aptvit.files.images import find_images

    folder, files = check_run("run", run), find_images(images)
    check_writable(out)

    from aptvit.dense.saved import from_pretrained
    from aptvit.report.prediction_files import predict_files

    dense = from_pretrained(folder)
    if dense.task != task:
        raise ValueError(
            f"{folder} is a training of {dense.task}: use aptvit {'detect' if task == 'segmentation' else 'segment'}"
        )
    dense.network.to(checked_device(device))
    with ProgressBars() as bars:
        rows, skipped = predict_files(dense, files, out, min_score, bars)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print_line(_line(row))
    finish(skipped)


def _line(row: dict[str, Any]) -> str:
    line = f"{row['file']}: {row['tokens']} of {row['uniform_tokens']} tokens"
    if row["tokens_read"] > row["tokens"]:
        line += f" ({row['tokens_read']} read in two passes)"
    if "boxes" in row:
        line += f", {len(row['boxes'])} objects"
    return f"{line}, {row['drawing']}"
