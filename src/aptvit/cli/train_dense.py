"""`aptvit train-detector` and `aptvit train-segmenter`: train detectors and segmenters on adaptive patches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.checks import is_chosen, require
from aptvit.cli.options import (
    MODEL,
    AllowChangesOption,
    BatchSizeOption,
    CheckpointOption,
    EpochsOption,
    JsonOption,
    KeepOption,
    MethodOption,
    ModelOption,
    OutOption,
    PrintConfigOption,
    RecipeOption,
    ResumeOption,
    SetOption,
    SizeOption,
    StartOption,
    TrainSplitOption,
    ValSplitOption,
)
from aptvit.cli.training import choose_recipe, print_recipe, run_training


def train_detector(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="A folder in the format of Pascal VOC (Annotations/, JPEGImages/), of COCO (images and a JSON file of "
            "boxes, or one with train and one with val in its name) or of YOLO (data.yaml, images/, labels/), or the "
            "JSON or YAML file.",
            metavar="DATA",
        ),
    ] = None,
    train: TrainSplitOption = None,
    val: ValSplitOption = None,
    model: ModelOption = MODEL,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    start: StartOption = None,
    method: MethodOption = None,
    keep: KeepOption = None,
    size: SizeOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    masks: Annotated[
        bool, typer.Option("--masks", help="Also predict a mask for each box, trained on the outlines of COCO.")
    ] = False,
    cascade: Annotated[bool, typer.Option("--cascade", help="Refine boxes in three stages (Cascade R-CNN).")] = False,
    values: SetOption = None,
    resume: ResumeOption = False,
    allow_changes: AllowChangesOption = False,
    print_config: PrintConfigOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a detector, or make a trained detector adaptive.

    The default recipe is detector; with --start it is detector-heal, or detector-short for --method uniform, and the
    default model is that of --start.

    Example: `aptvit train-detector cells/ --out uniform`, then
    `aptvit train-detector cells/ --start uniform --keep 0.7 --out adaptive` and
    `aptvit detect image.jpg --run adaptive`
    """
    changes = {"method": method, "keep": keep, "size": size, "epochs": epochs, "batch_size": batch_size}
    changes |= {"masks": masks or None, "cascade": cascade or None}
    name = recipe or _default_recipe("detector", start, method)
    chosen = choose_recipe(name, changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    folder = out or Path("train-detector")
    options: dict[str, Any] = {"checkpoint": checkpoint, "start": start, "train_split": train, "val_split": val}
    options |= {"resume": resume, "allow_changes": allow_changes}
    run_training(chosen, data, _named(context, model, start), folder, as_json, **options)


def train_segmenter(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            help="A folder with images and masks of the same names in images/training and annotations/training, "
            "train and trainannot, train/images and train/masks, or images and masks; or as Pascal VOC and Cityscapes.",
            metavar="DATA",
        ),
    ] = None,
    train: TrainSplitOption = None,
    val: ValSplitOption = None,
    model: ModelOption = MODEL,
    recipe: RecipeOption = None,
    checkpoint: CheckpointOption = None,
    start: StartOption = None,
    method: MethodOption = None,
    keep: KeepOption = None,
    size: SizeOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    ignore: Annotated[
        str | None, typer.Option(help="Values in the masks that belong to no class.", metavar="255,11")
    ] = None,
    subtract: Annotated[
        int | None, typer.Option(help="1 if masks count classes from 1 and use 0 for no class, as in ADE20K.")
    ] = None,
    colours: Annotated[
        str | None,
        typer.Option(
            help="Colours of the classes in masks: voc, cityscapes, ade20k, or a CSV file with name, r, g, b.",
            metavar="TABLE",
        ),
    ] = None,
    values: SetOption = None,
    resume: ResumeOption = False,
    allow_changes: AllowChangesOption = False,
    print_config: PrintConfigOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a segmenter, or make a trained segmenter adaptive.

    The default recipe is segmenter; with --start it is segmenter-choose, or segmenter-short for --method uniform, and
    the default model is that of --start.

    Example: `aptvit train-segmenter streets/ --ignore 255 --out uniform`, then
    `aptvit train-segmenter streets/ --start uniform --keep 0.7 --out adaptive` and
    `aptvit segment image.jpg --run adaptive`
    """
    changes: dict[str, Any] = {"method": method, "keep": keep, "size": size, "epochs": epochs}
    changes |= {"batch_size": batch_size, "ignore": ignore, "subtract": subtract}
    changes |= {"colours": colours}
    name = recipe or _default_recipe("segmenter", start, method)
    chosen = choose_recipe(name, changes, values)
    if print_config:
        print_recipe(chosen, as_json)
        return
    folder = out or Path("train-segmenter")
    options: dict[str, Any] = {"checkpoint": checkpoint, "start": start, "train_split": train, "val_split": val}
    options |= {"resume": resume, "allow_changes": allow_changes}
    run_training(chosen, data, _named(context, model, start), folder, as_json, **options)


def _named(context: typer.Context, model: str, start: Path | None) -> str | None:
    """The model of the command line; None for that of the training in --start, if there is one and no model."""
    return model if start is None or is_chosen(context, "model") else None


def _default_recipe(task: str, start: Path | None, method: str | None) -> str:
    require("train", "yaml")

    from aptvit.training.recipe import default_dense_recipe

    return default_dense_recipe(task, start is not None, method)
