"""`aptvit heal`: train an adaptive model to predict as its uniform model does, on images without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.checks import find_readable
from aptvit.cli.options import (
    MODEL,
    AllowChangesOption,
    CheckpointOption,
    ImagesArgument,
    ImgSizeOption,
    JsonOption,
    KeepOption,
    MethodOption,
    ModelOption,
    OutOption,
    PrintConfigOption,
    ResumeOption,
    SetOption,
    TrainSplitOption,
    ValSplitOption,
)
from aptvit.cli.training import choose_recipe, print_recipe, run_training


def heal(
    images: ImagesArgument,
    train: TrainSplitOption = None,
    val: ValSplitOption = None,
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    keep: KeepOption = None,
    method: MethodOption = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of training; by default 8.", min=0)] = None,
    values: SetOption = None,
    resume: ResumeOption = False,
    allow_changes: AllowChangesOption = False,
    print_config: PrintConfigOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the adaptive model for minutes to predict as the uniform model does, on your images without labels.

    A folder with the folders train and val is evaluated on val; of other images a tenth is held back. With --method, a
    baseline is trained in the same way, for comparison.

    Example: `aptvit heal holiday/ --model vit_base_patch16_384 --keep 0.5 --out healed`; then
    `model = aptvit.from_pretrained("healed/model")`
    """
    changes: dict[str, Any] = {"keep": keep, "max_minutes": minutes, "method": method}
    if method in ("downscale", "tome", "random") and not any("features_weight" in word for word in values or ()):
        changes["features_weight"] = 0.0  # their tokens have no place on the grid
    chosen = choose_recipe("heal", changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    find_readable(images)
    data, folder = [str(path.resolve()) for path in images], out or Path("heal")
    options: dict[str, Any] = {"checkpoint": checkpoint, "img_size": img_size, "resume": resume}
    options |= {"train_split": train, "val_split": val, "allow_changes": allow_changes}
    run_training(chosen, data, model, folder, as_json, **options)
