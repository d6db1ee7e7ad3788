"""`aptvit evaluate`: accuracy against measured time, for adaptive patches and their rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import (
    FAILED,
    KEEPS,
    MODEL,
    AsJson,
    Bars,
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Fresh,
    Keeps,
    Model,
    Name,
    Out,
    Rounds,
    Run,
    Scales,
    Sizes,
    as_list,
    check_file,
    check_run,
    check_writable,
    checked_device,
    command_line,
    finish,
    print_json,
    print_line,
    require,
    say,
)

if TYPE_CHECKING:
    from aptvit.evaluation.record import EvaluationRow


def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder of images, with a labels.csv or one folder per class if accuracy is wanted; the labels "
            "file itself (columns file and class_index); or the folder of a training.",
            metavar="DATA",
        ),
    ],
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    task: Annotated[
        Literal["classification", "detection", "segmentation"],
        typer.Option(help="detection or segmentation, by the training in --run, on a folder with boxes or masks."),
    ] = "classification",
    run: Run = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, each run at every fraction of --keeps, or name@value: apt-SCORER, apt-SCORER-global, random, "
            "resize, downscale, tome, tome-flash, evit, dtem, dtem-flash; with --task only downscale.",
            metavar="A,B@8",
        ),
    ] = None,
    keeps: Keeps = KEEPS,
    sizes: Sizes = None,
    scales: Scales = None,
    calibrate_on: Annotated[
        Path | None,
        typer.Option(help="Other images for methods that see some before; by default those evaluated.", metavar="PATH"),
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Use only that many, spread evenly.", min=1)] = None,
    timed_images: Annotated[int, typer.Option(help="Images that are timed.", min=1)] = 64,
    rounds: Rounds = None,
    batch_size: BatchSize = None,
    fit_steps: Annotated[int, typer.Option(help="Batches that DTEM is fitted on.", min=1)] = 100,
    dtype: Dtype = "float32",
    device: Device = None,
    out: Out = None,
    name: Name = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods on your images: accuracy, agreement with the uniform model, tokens, GFLOPs and time.

    Writes NAME.json after each row, so that an interrupted run continues where it stopped; at the end NAME.md and a
    plot.

    Example: `aptvit evaluate val/labels.csv --model vit_base_patch16_384 --methods apt-embedding,tome,downscale`; of a
    training `aptvit evaluate run`, or on other data `aptvit evaluate cells/ --task detection --run adaptive`
    """
    if not data.exists():
        raise ValueError(f"{data} does not exist: name a folder of images, a labels file, or the folder of a training")
    check_file("checkpoint", checkpoint)
    shares = as_list("keeps", keeps, float)
    if task != "classification":
        if methods not in (None, "downscale"):
            raise ValueError(f"--methods {methods!r}: a detector or segmenter is compared with 'downscale' alone")
        require("dense", "accelerate", "torchmetrics", "yaml", "transformers", "faster_coco_eval")
        folder = check_run("run", run)

        from aptvit.evaluation.training_run import evaluate_run_on

        rows = evaluate_run_on(str(data), folder, task, shares if methods else [], rounds or 5, checked_device(device))
        _print_rows(rows, f"On {data}", as_json)
        return
    if (data / "run.json").is_file():
        require("train", "accelerate", "torchmetrics", "yaml")

        from aptvit.evaluation.training_run import evaluate_run

        rows = evaluate_run(data, batch_size or 8, rounds or 5, checked_device(device))
        _print_rows(rows, "On validation images", as_json)
        return
    others = _others(calibrate_on)
    folder = out or Path("evaluate")
    check_writable(folder)

    import torch

    from aptvit.evaluation.methods import DEFAULT_METHODS, Conditions, parse_methods
    from aptvit.evaluation.report import as_tables, write_results
    from aptvit.evaluation.run import run_evaluation
    from aptvit.hosts.pretrained import check_model, load_host

    check_model(model)
    chosen = parse_methods(as_list("methods", methods, str) if methods else DEFAULT_METHODS, shares)
    place = checked_device(device)
    name = name or place.replace(":", "")
    conditions = Conditions(
        dtype=getattr(torch, dtype),
        device=place,
        batch_size=batch_size or 8,
        timed_images=timed_images,
        rounds=rounds or 5,
        scales=scales or 2,
        max_images=max_images,
        fit_steps=fit_steps,
        calibration=others,
    )
    with Bars() as bars:
        record = run_evaluation(
            data,
            partial(load_host, model, checkpoint),
            model,
            chosen,
            folder / f"{name}.json",
            sizes=[None] if sizes is None else as_list("sizes", sizes, int),
            conditions=conditions,
            command=command_line(),
            fresh=fresh,
            progress=bars,
            done=_say_row,
        )
    written = write_results(record, folder, name)
    if as_json:
        print((folder / f"{name}.json").read_text(encoding="utf-8"))
    else:
        Console().print(as_tables(record))
        print_line(f"Files: {', '.join(map(str, written))}")
    finish(record.skipped)
    if any(row.error for row in record.rows):
        raise typer.Exit(FAILED)


def _others(images: Path | None) -> tuple[Path, ...] | None:
    from aptvit.files.images import find_images

    return None if images is None else tuple(find_images([images]))


def _print_rows(rows: Sequence[Mapping[str, float | str]], title: str, as_json: bool) -> None:
    """A column for each row."""
    if as_json:
        print_json(rows)
        return
    table = Table(title=f"{title}; speed-up beside the uniform model", show_header=False)
    for name in rows[0]:
        values = [row[name] for row in rows]
        table.add_row(name, *(value if isinstance(value, str) else f"{value:.4g}" for value in values))
    Console().print(table)


def _say_row(row: EvaluationRow) -> None:
    """A line for each row as it is done: long runs are watched."""
    found = row.error or f"{row.tokens:.1%} of the tokens, {row.time.median:.2f} of the time"
    say(f"{row.size} px, {row.method}: {found}")
