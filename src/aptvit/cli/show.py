"""`aptvit show`: the patches of images, without any model, and why they are what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.options import (
    AsJson,
    Bars,
    Images,
    Keep,
    Out,
    PerImage,
    Scales,
    Scorer,
    Thresholds,
    as_wish,
    check_budget,
    check_writable,
    finish,
    print_json,
    print_line,
)


def show(
    images: Images,
    why: Annotated[
        str | None,
        typer.Option(
            "--why",
            help="Why is this pixel, its column and row in the image, in the patch that it is in? Marks the patch.",
            metavar="X,Y",
        ),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Put the score map of each scale beside the image.")] = False,
    patch_size: Annotated[int, typer.Option(help="Side of a base patch in pixels.", min=2)] = 16,
    longer_side: Annotated[int, typer.Option(help="Pixels that the longer side is resized to.", min=1)] = 384,
    thresholds: Thresholds = None,
    keep: Keep = None,
    per_image: PerImage = False,
    scales: Scales = None,
    scorer: Scorer = "entropy",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Draw the patches of images, without any model.

    Thresholds for --keep are found on these images.

    Example: `aptvit show cat.jpg --thresholds 5.5 4.0 --scores --out patches`; then
    `aptvit show cat.jpg --thresholds 5.5 4.0 --why 120,80`
    """
    from aptvit.files.images import find_images

    check_budget(thresholds, keep, per_image, scales)
    pixel = None if why is None else as_pixel(why)
    files, folder = find_images(images), out or Path("show")
    check_writable(folder)

    from aptvit.report.patches import show_patches

    wish = as_wish(thresholds, keep, per_image, scales)
    with Bars() as bars:
        shown = show_patches(files, folder, wish, patch_size, longer_side, scorer, scores, bars, pixel)
    if as_json:
        print_json(shown.to_dict())
    else:
        for picture in shown.images:
            tokens = f"{picture.tokens} of {picture.tokens_uniform} tokens ({picture.keep_ratio:.0%})"
            print_line(f"{picture.path}  {tokens}")
            if picture.explanation is not None:
                print(f"\n{picture.explanation_text}\n")
    finish(shown.skipped)


def as_pixel(words: str) -> tuple[int, int]:
    """Column and row of a pixel."""
    try:
        x, y = (int(word) for word in words.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--why {words}: give the column and the row of a pixel, such as 120,80") from None
    return x, y
