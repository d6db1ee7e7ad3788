"""`aptvit heal`: an adaptive model close to the original again, from your own images, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.options import (
    MODEL,
    AsJson,
    Checkpoint,
    Images,
    ImgSize,
    Keep,
    Model,
    Out,
    PrintConfig,
    Resume,
    Set,
)
from aptvit.cli.training import choose_recipe, print_recipe, run_training


def heal(
    images: Images,
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    keep: Keep = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training; 8 by default.", min=0)] = None,
    values: Set = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train the adaptive model to answer as the uniform one does, on your images, without labels, in minutes.

    Example: `aptvit heal holiday/ --model vit_base_patch16_384 --keep 0.5 --out healed`; then
    `model = aptvit.from_pretrained("healed/model")`
    """
    from aptvit.files.images import find_images

    chosen = choose_recipe("heal", {"keep": keep, "max_minutes": minutes}, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    find_images(images)
    data, folder = [str(path.resolve()) for path in images], out or Path("heal")
    run_training(chosen, data, model, folder, as_json, checkpoint=checkpoint, img_size=img_size, resume=resume)
