"""`aptvit finetune`: train an adaptive classifier with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.options import (
    MODEL,
    AllowChangesOption,
    BatchSizeOption,
    CheckpointOption,
    EpochsOption,
    ImgSizeOption,
    JsonOption,
    KeepOption,
    ModelOption,
    OutOption,
    PrintConfigOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    TrainSplitOption,
    ValSplitOption,
)
from aptvit.cli.training import choose_recipe, print_recipe, run_training


def finetune(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A folder with a folder for each class (or train/ and val/ with such folders), a folder of *.tar "
            "shards, or hf:NAME, a dataset of the Hugging Face hub or on disk.",
            metavar="DATA",
        ),
    ] = None,
    train: TrainSplitOption = None,
    val: ValSplitOption = None,
    model: ModelOption = MODEL,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    keep: KeepOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    recalibrate: Annotated[
        int | None,
        typer.Option(help="Number of updates between two calibrations of the thresholds.", metavar="UPDATES"),
    ] = None,
    values: SetOption = None,
    resume: ResumeOption = False,
    allow_changes: AllowChangesOption = False,
    print_config: PrintConfigOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a pretrained model on adaptive patches.

    The recipes are short (the default, for classes that the checkpoint has), new-head (for other classes), full,
    adapters, distill and heal.

    Example: `aptvit finetune flowers/ --model vit_base_patch16_384 --recipe new-head --keep 0.5 --out run`; on two GPUs
    `torchrun --nproc-per-node 2 -m aptvit finetune flowers/ ...`; then `aptvit.from_pretrained("run/model")`
    """
    changes = {"keep": keep, "epochs": epochs, "batch_size": batch_size, "recalibrate": recalibrate}
    chosen = choose_recipe(recipe or "short", changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    folder = out or Path("finetune")
    options: dict[str, Any] = {"checkpoint": checkpoint, "img_size": img_size, "train_split": train, "val_split": val}
    run_training(chosen, data, model, folder, as_json, **options, resume=resume, allow_changes=allow_changes)
