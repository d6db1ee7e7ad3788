"""`aptvit train-detector` and `aptvit train-segmenter`: dense tasks on adaptive patches, by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aptvit.cli.finetune import PrintConfig, Resume, Set, show, train
from aptvit.cli.options import AsJson

Model = Annotated[str, typer.Option(help="timm's name of the backbone.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights of the backbone instead of timm's own.")]
Start = Annotated[
    Path | None, typer.Option(help="A training to start from, usually that of the uniform model.", metavar="RUN")
]
Method = Annotated[str | None, typer.Option(help="apt, uniform, or resize (no sub-patch branch).")]
Keep = Annotated[
    float | None, typer.Option(help="Share of the patch tokens to keep, on average over the pictures without padding.")
]
Size = Annotated[int | None, typer.Option(help="Side of the squares that are trained on, in pixels.", min=32)]
Epochs = Annotated[int | None, typer.Option(help="Passes over the pictures.", min=1)]
BatchSize = Annotated[int | None, typer.Option(help="Pictures of an update, on all processes together.", min=1)]
RecipeName = Annotated[
    str | None,
    typer.Option(
        help="A recipe or a YAML file; with --start by default the one that heals, or the short one if uniform."
    ),
]


def train_detector(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder in Pascal VOC's form (Annotations/, JPEGImages/) or COCO's (a JSON file of boxes beside its "
            "pictures, or one with train and one with val in its name), or COCO's JSON file.",
            metavar="DATA",
        ),
    ],
    model: Model = "vit_base_patch16_384",
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
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and model.")] = Path("detector"),
    resume: Resume = False,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Train a detector, or make a trained one adaptive.

    Example: `aptvit train-detector cells/ --out uniform`, then
    `aptvit train-detector cells/ --start uniform --keep 0.7 --out adaptive` and
    `aptvit detect photo.jpg --model adaptive`
    """
    given = {"method": method, "keep": keep, "size": size, "epochs": epochs, "batch_size": batch_size}
    given |= {"masks": masks or None, "cascade": cascade or None}
    name = recipe or _default("detector", start, method)
    _train(name, given, values, data, model, checkpoint, start, out, resume, print_config, as_json)


def train_segmenter(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures and masks of the same names: images/training and annotations/training, train "
            "and trainannot, train/images and train/masks, or images and masks.",
            metavar="DATA",
        ),
    ],
    model: Model = "vit_base_patch16_384",
    recipe: RecipeName = None,
    checkpoint: Checkpoint = None,
    start: Start = None,
    method: Method = None,
    keep: Keep = None,
    size: Size = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    ignore: Annotated[
        str | None, typer.Option(help="Numbers in the masks that no class belongs to.", metavar="255,11")
    ] = None,
    subtract: Annotated[
        int | None, typer.Option(help="1 where masks count classes from 1 and have 0 for none, as ADE20K's do.")
    ] = None,
    values: Set = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and model.")] = Path("segmenter"),
    resume: Resume = False,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Train a segmenter, or make a trained one adaptive.

    Example: `aptvit train-segmenter streets/ --ignore 255 --out uniform`, then
    `aptvit train-segmenter streets/ --start uniform --keep 0.7 --out adaptive` and
    `aptvit segment photo.jpg --model adaptive`
    """
    given = {"method": method, "keep": keep, "size": size, "epochs": epochs, "batch_size": batch_size}
    given |= {"ignore": ignore, "subtract": subtract}
    name = recipe or _default("segmenter", start, method)
    _train(name, given, values, data, model, checkpoint, start, out, resume, print_config, as_json)


def _default(kind: str, start: Path | None, method: str | None) -> str:
    """The recipe's name. What heals boxes does nothing for classes of pixels (docs/how-to/train-dense.md)."""
    if start is None:
        return kind
    if method == "uniform":
        return f"{kind}-short"
    return "detector-heal" if kind == "detector" else "segmenter-choose"


def _train(
    name: str,
    given: dict[str, Any],
    values: Sequence[str] | None,
    data: str,
    model: str,
    checkpoint: Path | None,
    start: Path | None,
    out: Path,
    resume: bool,
    print_config: bool,
    as_json: bool,
) -> None:
    from aptvit.training import load_recipe

    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    chosen = load_recipe(name, [*overrides, *(values or [])])
    if print_config:
        print(chosen.to_yaml(), end="")
        return
    show(train(chosen, data, model, checkpoint, None, out, resume, start), out, as_json)
