"""`aptvit detect` and `aptvit segment`: run a trained detector or segmenter on images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.checks import check_run, check_writable, checked_device, find_readable
from aptvit.cli.options import DeviceOption, ImagesArgument, JsonOption, OutOption, RunOption
from aptvit.cli.output import ProgressBars, finish, print_json, print_line

MaxSideOption = Annotated[
    int | None,
    typer.Option(
        "--max-side",
        help="Longer side in pixels that larger images are reduced to before they are read; 1440 by default. Results "
        "are in the image's own pixels.",
        min=32,
    ),
]
TileOption = Annotated[
    int | None,
    typer.Option(
        "--tile",
        help="Side in pixels of overlapping tiles that larger images are read in at their full size, instead of being "
        "reduced; takes longer, and draws no patches.",
        min=32,
    ),
]


def detect(
    images: ImagesArgument,
    run: RunOption = None,
    min_score: Annotated[float, typer.Option(help="Leave out boxes with lower scores.", min=0, max=1)] = 0.5,
    max_side: MaxSideOption = None,
    tile: TileOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find objects in images. Writes a drawing of each image with its boxes and, next to it, its patches.

    Example: `aptvit detect holiday/ --run detector`
    """
    _find("detection", images, run, min_score, out or Path("detect"), device, as_json, max_side, tile)


def segment(
    images: ImagesArgument,
    run: RunOption = None,
    max_side: MaxSideOption = None,
    tile: TileOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the class of each pixel of images. Writes a mask of classes for each image, and a drawing with its patches.

    Example: `aptvit segment street.jpg --run segmenter`
    """
    _find("segmentation", images, run, 0.0, out or Path("segment"), device, as_json, max_side, tile)


def _find(
    task: str,
    images: list[Path],
    run: Path | None,
    min_score: float,
    out: Path,
    device: str | None,
    as_json: bool,
    max_side: int | None,
    tile: int | None,
) -> None:
    if max_side is not None and tile is not None:
        raise ValueError("--max-side and --tile: give one, tiles are read at the image's own size")

    folder, files = check_run("run", run), find_readable(images)
    check_writable(out)

    from aptvit.dense.large import MAX_SIDE
    from aptvit.dense.saved import from_pretrained
    from aptvit.report.prediction_files import predict_files

    dense = from_pretrained(folder)
    if dense.task != task:
        raise ValueError(
            f"{folder} is a training of {dense.task}: use aptvit {'detect' if task == 'segmentation' else 'segment'}"
        )
    dense.network.to(checked_device(device))
    if tile is None:
        max_side = max_side or MAX_SIDE
    with ProgressBars() as bars:
        rows, skipped = predict_files(dense, files, out, min_score, bars, max_side, tile)
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print_line(_line(row, "detected" if task == "detection" else "segmented"))
    finish(skipped)


def _line(row: dict[str, Any], verb: str) -> str:
    (width, height), (read_width, read_height) = row["size"], row["read_size"]
    tiling = f"in {row['num_tiles']} tiles of" if row["num_tiles"] > 1 else "at"
    line = f"{row['file']}: {width}x{height}, {verb} {tiling} {read_width}x{read_height}"
    line += f", {row['tokens']} of {row['uniform_tokens']} tokens"
    if row["tokens_read"] > row["tokens"]:
        line += f" ({row['tokens_read']} read in two passes)"
    if "boxes" in row:
        line += f", {len(row['boxes'])} objects"
    return f"{line}, {row['drawing']}"
