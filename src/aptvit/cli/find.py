"""`aptvit detect` and `aptvit segment`: what a trained model finds in images, with the patches beside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.options import (
    AsJson,
    Bars,
    Device,
    Images,
    Out,
    Run,
    check_run,
    check_writable,
    checked_device,
    finish,
    print_json,
    print_line,
)


def detect(
    images: Images,
    run: Run = None,
    min_score: Annotated[float, typer.Option(help="Leave out boxes below this score.", min=0, max=1)] = 0.5,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find objects in images; writes each with its boxes, the patches beside.

    Example: `aptvit detect holiday/ --run detector`
    """
    _find("detection", images, run, min_score, out or Path("detect"), device, as_json)


def segment(
    images: Images,
    run: Run = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find the class of each pixel of images; writes each with its classes, the patches beside, and a mask.

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
        raise ValueError(f"{folder} does {dense.task}: use aptvit {'detect' if task == 'segmentation' else 'segment'}")
    dense.network.to(checked_device(device))
    with Bars() as bars:
        rows, skipped = predict_files(dense, files, out, min_score, bars)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print_line(_line(row))
    finish(skipped)


def _line(row: dict[str, Any]) -> str:
    told = f"{row['file']}: {row['tokens']} of {row['uniform_tokens']} tokens"
    if row["tokens_read"] > row["tokens"]:
        told += f" ({row['tokens_read']} read in two passes)"
    if "boxes" in row:
        told += f", {len(row['boxes'])} objects"
    return f"{told}, {row['drawing']}"
