"""`aptvit finetune`: train an adaptive model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aptvit.cli.options import (
    MODEL,
    AsJson,
    BatchSize,
    Checkpoint,
    Epochs,
    ImgSize,
    Keep,
    Model,
    Out,
    PrintConfig,
    RecipeName,
    Resume,
    Set,
)
from aptvit.cli.training import choose_recipe, print_recipe, run_training


def finetune(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder with a folder for each class (or train/ and val/ of that kind), a folder of *.tar shards, "
            "or hf:NAME, a dataset of the Hugging Face hub or on disk.",
            metavar="DATA",
        ),
    ],
    model: Model = MODEL,
    recipe: RecipeName = None,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    keep: Keep = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    recalibrate: Annotated[
        int | None, typer.Option(help="Find the thresholds again after so many updates.", metavar="UPDATES")
    ] = None,
    values: Set = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pretrained model on adaptive patches.

    Recipes are full, short (the usual one), adapters, distill and heal.

    Example: `aptvit finetune flowers/ --model vit_base_patch16_384 --recipe short --keep 0.5 --out run`; on two GPUs
    `torchrun --nproc-per-node 2 -m aptvit finetune flowers/ ...`; then `aptvit.from_pretrained("run/model")`
    """
    changes = {"keep": keep, "epochs": epochs, "batch_size": batch_size, "recalibrate": recalibrate}
    chosen = choose_recipe(recipe or "short", changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    folder = out or Path("finetune")
    run_training(chosen, data, model, folder, as_json, checkpoint=checkpoint, img_size=img_size, resume=resume)
