"""`aptvit finetune`: train an adaptive model by a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import AsJson, check_writable

if TYPE_CHECKING:
    from aptvit.training import Recipe

Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any value of the recipe, as NAME=VALUE.", metavar="NAME=VALUE")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the recipe with all its values, and stop.")]


def finetune(
    data: Annotated[
        str,
        typer.Argument(
            help="A folder with a folder for each class (or train/ and val/ of that kind), a folder of *.tar shards, "
            "or hf:NAME, a dataset of the Hugging Face hub or on disk.",
            metavar="DATA",
        ),
    ],
    model: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_base_patch16_384",
    recipe: Annotated[str, typer.Option(help="full, short, adapters, distill, heal, or a YAML file.")] = "short",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.", min=1)] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the patch tokens to keep.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of an update, on all processes together.")] = None,
    recalibrate: Annotated[int | None, typer.Option(help="Find the thresholds again after so many updates.")] = None,
    values: Set = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and model.")] = Path("run"),
    resume: Resume = False,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a pretrained model on adaptive patches.

    Example: `aptvit finetune flowers/ --model vit_base_patch16_384 --recipe short --keep 0.5 --out run`; on two GPUs
    `torchrun --nproc-per-node 2 -m aptvit finetune flowers/ ...`; then `aptvit.from_pretrained("run/model")`
    """
    from aptvit.training import load_recipe

    given = {"keep": keep, "epochs": epochs, "batch_size": batch_size, "recalibrate": recalibrate}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    chosen = load_recipe(recipe, [*overrides, *(values or [])])
    if print_config:
        print(chosen.to_yaml(), end="")
        return
    show(train(chosen, data, model, checkpoint, img_size, out, resume), out, as_json)


def train(
    recipe: Recipe,
    data: str | list[str],
    model: str,
    checkpoint: Path | None,
    img_size: int | None,
    out: Path,
    resume: bool,
    start: Path | None = None,
) -> dict[str, Any]:
    """Run a training, or the rest of one.

    Args:
        recipe: How.
        data: What `aptvit.training.find_sources` or `aptvit.dense` reads, or photos.
        model: timm's name of the model.
        checkpoint: Its weights.
        img_size: Side of its input.
        out: Folder of the training.
        resume: Go on from the newest checkpoint in it.
        start: A trained detector or segmenter to take weights from.
    """
    from aptvit.evaluation.training_run import sources_of, write_origin
    from aptvit.hosts.pretrained import load_host
    from aptvit.training.trainer import Training

    check_writable(out)
    if not resume and any((out / "checkpoints").glob("[0-9]*")):
        raise ValueError(f"{out} holds a training already: --resume goes on with it, another --out starts anew")
    images, evaluation = sources_of(data, recipe)
    errors = Console(stderr=True)
    for problem in getattr(images, "problems", ()):
        errors.print(f"left out: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    training = Training(recipe, load_host(model, checkpoint, img_size), images, evaluation, out, start)
    if training.processes.is_first:
        file = None if checkpoint is None else str(checkpoint.resolve())
        if isinstance(data, str) and not data.startswith("hf:"):
            data = str(Path(data).resolve())
        write_origin(out, recipe, data=data, model=model, checkpoint=file, img_size=img_size)
    return training.run(resume)


def show(results: dict[str, Any], out: Path, as_json: bool) -> None:
    """What evaluation found, before and after."""
    if as_json:
        print(json.dumps(results, indent=2))
        return
    console = Console()
    rows = results["evaluations"]
    if rows:
        names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("update", "what")]
        table = Table(title="On images set aside")
        for heading in ("updates", *names):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(str(row["update"]), *(f"{row[name]:.4g}" if name in row else "" for name in names))
        console.print(table)
    if results["finished"]:
        console.print(f"Model: {out / 'model'}\nPage: {out / 'index.html'}", soft_wrap=True, highlight=False)
