"""`aptvit show`: the patches of photos, without any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from aptvit.cli.options import (
    AsJson,
    Bars,
    Keep,
    Paths,
    PerImage,
    Scales,
    ScorerOption,
    Thresholds,
    as_wish,
    check_writable,
)


def show(
    photos: Paths,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("patches"),
    scores: Annotated[bool, typer.Option("--scores", help="Put the score map of each scale beside the photo.")] = False,
    patch_size: Annotated[int, typer.Option(help="Side of a base patch in pixels.", min=2)] = 16,
    img_size: Annotated[
        int, typer.Option(help="Longer side of the photo in pixels, as cut into patches.", min=1)
    ] = 384,
    thresholds: Thresholds = None,
    keep: Keep = None,
    per_image: PerImage = False,
    scales: Scales = None,
    scorer: ScorerOption = "entropy",
    as_json: AsJson = False,
) -> None:
    """Draw the patches of photos, without any model.

    Example: `aptvit show cat.jpg --thresholds 5.5 4.0 --scores --out patches`
    """
    from aptvit.files.images import find_images
    from aptvit.report.patches import show_patches

    check_writable(out)
    files = find_images(photos)
    wish = as_wish(thresholds, keep, per_image, scales, default_scales=3)
    with Bars(Console(stderr=True)) as bars:
        shown = show_patches(files, out, wish, patch_size, img_size, scorer, scores, bars)
    for message in shown.skipped:
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(shown.to_dict(), indent=2))
        return
    for picture in shown.pictures:
        print(f"{picture.path}  {picture.tokens} of {picture.tokens_uniform} tokens ({picture.keep_ratio:.0%})")
