"""`aptvit heal`: an adaptive model close to the original again, from your own photos, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.finetune import PrintConfig, Resume, Set, show, train
from aptvit.cli.options import AsJson, Paths


def heal(
    photos: Paths,
    model: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_base_patch16_384",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.", min=1)] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the patch tokens to keep, 0.5 by default.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to train.", min=0)] = None,
    values: Set = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and model.")] = Path("healed"),
    resume: Resume = False,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Let the uniform model teach the adaptive one, on your photos, without labels, in minutes.

    Example: `aptvit heal holiday/ --model vit_base_patch16_384 --keep 0.5 --out healed`; then
    `model = aptvit.from_pretrained("healed/model")`
    """
    from aptvit.training import load_recipe

    given = {"keep": keep, "max_minutes": minutes}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    chosen = load_recipe("heal", [*overrides, *(values or [])])
    if print_config:
        print(chosen.to_yaml(), end="")
        return
    data = [str(path.resolve()) for path in photos]
    show(train(chosen, data, model, checkpoint, img_size, out, resume), out, as_json)
