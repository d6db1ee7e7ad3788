"""Shared parts of the commands that train: checks before the training, and results after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.checks import check_data, check_file, check_run, check_writable, require
from aptvit.cli.options import MODEL
from aptvit.cli.output import INTERRUPTED, print_json, print_line, print_message, print_problem

if TYPE_CHECKING:
    from aptvit.training import Recipe


def choose_recipe(name: str, changes: Mapping[str, Any], values: Sequence[str] | None) -> Recipe:
    """Load a recipe and change settings.

    Args:
        name: Name of a recipe, or a YAML file.
        changes: Settings from options of the command, None for those that are not set.
        values: Values of --set, ``NAME=VALUE`` each.

    Raises:
        ValueError: If an option and a value set the same.
    """
    require("train", "yaml")

    from aptvit.training import load_recipe

    options = {setting: value for setting, value in changes.items() if value is not None}
    for word in values or []:
        setting = word.partition("=")[0].strip().replace("-", "_")
        if setting in options:
            option = {"max_minutes": "minutes"}.get(setting, setting).replace("_", "-")
            raise ValueError(f"--{option} and --set {word} set the same: give one of them")
    return load_recipe(name, [*(f"{setting}={value}" for setting, value in options.items()), *(values or [])])


def print_recipe(recipe: Recipe, as_json: bool) -> None:
    """Print all settings of a recipe, as YAML or JSON."""
    if as_json:
        print_json(vars(recipe))
    else:
        print(recipe.to_yaml(), end="")


def run_training(
    recipe: Recipe,
    data: str | list[str] | None,
    model: str | None,
    out: Path,
    as_json: bool,
    *,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    start: Path | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    train_split: str | None = None,
    val_split: str | None = None,
) -> None:
    """Train and print the results of all evaluations. Arguments as for `aptvit.training.run_folder.train`.

    Without a model, that of ``start`` is trained.
    """
    of_task = {"detection": ["faster_coco_eval"], "segmentation": ["transformers"]}.get(recipe.task, [])
    require("dense" if of_task else "train", "accelerate", "torchmetrics", *of_task)
    if not isinstance(data, list):
        check_data(data, train_split, val_split)
    check_file("checkpoint", checkpoint)
    if start is not None:
        check_run("start", start)
    check_writable(out)
    if allow_changes and not resume:
        raise ValueError("--allow-changes is for a training that is continued: add --resume, or leave it out")
    if not resume and any((out / "checkpoints").glob("[0-9]*")):
        raise ValueError(
            f"{out} holds a training already: continue it with --resume, or start a new one in another --out"
        )

    from aptvit.training.run_folder import train

    if model is None:
        model, checkpoint, img_size = _model_of(start, checkpoint)
    options: dict[str, Any] = {"checkpoint": checkpoint, "img_size": img_size, "start": start}
    options |= {"resume": resume, "allow_changes": allow_changes, "train_split": train_split, "val_split": val_split}
    results = train(recipe, data, model, out, **options, tell=print_message, report=print_problem)
    if as_json:
        print_json(results)
    else:
        _print_results(results, out)
    if not results["finished"]:
        raise typer.Exit(INTERRUPTED)


def _model_of(start: Path | None, checkpoint: Path | None) -> tuple[str, Path | None, int | None]:
    """The model of a training, its checkpoint and its side in pixels; the usual model if the folder does not tell."""
    from aptvit.training.run_folder import is_run, read_origin

    folder = next((path for path in (start, start.parent) if is_run(path)), None) if start else None  # or model/ in it
    if folder is None:
        return MODEL, checkpoint, None
    origin = read_origin(folder)
    before = None if origin["checkpoint"] is None else Path(origin["checkpoint"])
    # Its weights are replaced by those of --start: it may be missing.
    return origin["model"], checkpoint or (before if before and before.is_file() else None), origin["img_size"]


def _print_results(results: dict[str, Any], out: Path) -> None:
    rows = results["evaluations"]
    if rows:
        names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("update", "what")]
        table = Table(title="On validation images")
        for heading in ("updates", *names):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(str(row["update"]), *(f"{row[name]:.4g}" if name in row else "" for name in names))
        Console().print(table)
    if results["finished"]:
        print_line(f"Model: {out / 'model'}\nPage: {out / 'index.html'}")
