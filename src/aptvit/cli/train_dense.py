"""`aptvit train-detector` and `aptvit train-segmenter`: dense tasks on adaptive patches, by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.options import (
    MODEL,
    AsJson,
    BatchSize,
    Checkpoint,
    Epochs,
    Keep,
    Method,
    Model,
    Out,
    PrintConfig,
    RecipeName,
    Resume,
    Set,
    Size,
    Start,
    require,
)
from aptvit.cli.training import choose_recipe, print_recipe, run_training


def train_detector(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder in Pascal VOC's form (Annotations/, JPEGImages/) or COCO's (a JSON file of boxes beside its "
            "images, or one with train and one with val in its name), or COCO's JSON file.",
            metavar="DATA",
        ),
    ],
    model: Model = MODEL,
    recipe: RecipeName = None,
    checkpoint: Checkpoint = None,
    start: Start = None,
    method: Method = None,
    keep: Keep = None,
    size: Size = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    masks: Annotated[bool, typer.Option("--masks", help="Learn a mask for each box, from COCO's outlines.")] = False,
    cascade: Annotated[bool, typer.Option("--cascade", help="Three stages of boxes (Cascade R-CNN).")] = False,
    values: Set = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train a detector, or make a trained one adaptive.

    The usual recipe is detector; with --start detector-heal, or detector-short for --method uniform.

    Example: `aptvit train-detector cells/ --out uniform`, then
    `aptvit train-detector cells/ --start uniform --keep 0.7 --out adaptive` and
    `aptvit detect photo.jpg --run adaptive`
    """
    changes = {"method": method, "keep": keep, "size": size, "epochs": epochs, "batch_size": batch_size}
    changes |= {"masks": masks or None, "cascade": cascade or None}
    name = recipe or _default_recipe("detector", start, method)
    chosen = choose_recipe(name, changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    folder = out or Path("train-detector")
    run_training(chosen, data, model, folder, as_json, checkpoint=checkpoint, start=start, resume=resume)


def train_segmenter(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of images and masks of the same names: images/training and annotations/training, train "
            "and trainannot, train/images and train/masks, or images and masks.",
            metavar="DATA",
        ),
    ],
    model: Model = MODEL,
    recipe: RecipeName = None,
    checkpoint: Checkpoint = None,
    start: Start = None,
    method: Method = None,
    keep: Keep = None,
    size: Size = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    ignore: Annotated[
        str | None, typer.Option(help="Values in the masks that belong to no class.", metavar="255,11")
    ] = None,
    subtract: Annotated[
        int | None, typer.Option(help="1 where masks count classes from 1 and have 0 for none, as ADE20K's do.")
    ] = None,
    values: Set = None,
    resume: Resume = False,
    print_config: PrintConfig = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train a segmenter, or make a trained one adaptive.

    The usual recipe is segmenter; with --start segmenter-choose, or segmenter-short for --method uniform.

    Example: `aptvit train-segmenter streets/ --ignore 255 --out uniform`, then
    `aptvit train-segmenter streets/ --start uniform --keep 0.7 --out adaptive` and
    `aptvit segment photo.jpg --run adaptive`
    """
    changes: dict[str, Any] = {"method": method, "keep": keep, "size": size, "epochs": epochs}
    changes |= {"batch_size": batch_size, "ignore": ignore, "subtract": subtract}
    name = recipe or _default_recipe("segmenter", start, method)
    chosen = choose_recipe(name, changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    folder = out or Path("train-segmenter")
    run_training(chosen, data, model, folder, as_json, checkpoint=checkpoint, start=start, resume=resume)


def _default_recipe(task: str, start: Path | None, method: str | None) -> str:
    require("train", "yaml")

    from aptvit.training.recipe import default_dense_recipe

    return default_dense_recipe(task, start is not None, method)
