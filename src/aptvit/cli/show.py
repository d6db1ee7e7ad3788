"""`aptvit show`: draw the patches of images without a model, and explain the size of a patch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.checks import as_target, check_budget, check_writable, find_readable
from aptvit.cli.options import (
    ImagesArgument,
    JsonOption,
    KeepOption,
    OutOption,
    PerImageOption,
    ScalesOption,
    ScorerOption,
    ThresholdsOption,
)
from aptvit.cli.output import ProgressBars, finish, print_json, print_line


def show(
    images: ImagesArgument,
    pixel: Annotated[
        str | None,
        typer.Option(
            "--why",
            help="Column and row of a pixel in the image: explain why its patch was selected, and mark the patch.",
            metavar="X,Y",
        ),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Also draw the score map of each larger size.")] = False,
    patch_size: Annotated[int, typer.Option(help="Side of a base patch in pixels.", min=2)] = 16,
    longer_side: Annotated[int, typer.Option(help="Length in pixels that the longer side is resized to.", min=1)] = 384,
    thresholds: ThresholdsOption = None,
    keep: KeepOption = None,
    per_image: PerImageOption = False,
    scales: ScalesOption = None,
    scorer: ScorerOption = "entropy",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the patches of images without a model.

    Thresholds for --keep are calibrated on these images.

    Example: `aptvit show cat.jpg --thresholds 5.5 4.0 --scores --out patches`; then
    `aptvit show cat.jpg --thresholds 5.5 4.0 --why 120,80`
    """
    check_budget(thresholds, keep, per_image, scales)
    position = None if pixel is None else as_pixel(pixel)
    files, folder = find_readable(images), out or Path("show")
    check_writable(folder)

    from aptvit.report.patches import show_patches

    target = as_target(thresholds, keep, per_image, scales)
    with ProgressBars() as bars:
        result = show_patches(files, folder, target, patch_size, longer_side, scorer, scores, bars, position)
    if as_json:
        print_json(result.to_dict())
    else:
        for drawing in result.images:
            tokens = f"{drawing.tokens} of {drawing.tokens_uniform} tokens ({drawing.keep_ratio:.0%})"
            print_line(f"{drawing.path}  {tokens}")
            if drawing.explanation is not None:
                print(f"\n{drawing.explanation_text}\n")
    finish(result.skipped)


def as_pixel(words: str) -> tuple[int, int]:
    """Parse the value of --why: column and row of a pixel.

    Raises:
        ValueError: If the value is not two whole numbers.
    """
    try:
        x, y = (int(word) for word in words.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--why {words}: give the column and the row of a pixel, such as 120,80") from None
    return x, y
