"""`aptvit evaluate`: accuracy against measured time, for adaptive patches and their rivals."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import AsJson, Bars, as_list, check_writable, checked_device

if TYPE_CHECKING:
    from aptvit.evaluation.record import EvaluationRow


def evaluate(
    photos: Annotated[
        Path,
        typer.Argument(
            help="A folder of photos, with a labels.csv or one folder per class if accuracy is wanted; the labels "
            "file itself (columns file and class_index); or the folder of a training.",
            metavar="FOLDER_OR_LABELS",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="timm's name of the model; with --task the folder of a training.")
    ] = "vit_base_patch16_384",
    task: Annotated[
        Literal["classification", "detection", "segmentation"],
        typer.Option(help="Of a folder with boxes or masks: detection or segmentation, by the training in --model."),
    ] = "classification",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, each run at every share of --keep, or name@value: apt-SCORER, apt-SCORER-global, random, "
            "resize, downscale, tome, tome-flash, evit, dtem, dtem-flash; with --task only downscale.",
            metavar="A,B@8",
        ),
    ] = None,
    keep: Annotated[str, typer.Option(help="Shares of the tokens.")] = "0.83,0.67,0.51",
    sizes: Annotated[
        str | None, typer.Option(help="Sides of the input in pixels; the model's own by default.", metavar="224,384")
    ] = None,
    calibrate_on: Annotated[
        Path | None, typer.Option(help="Other photos for methods that see some before; by default those evaluated.")
    ] = None,
    max_photos: Annotated[int | None, typer.Option(help="Use only that many, spread evenly.", min=1)] = None,
    timed_photos: Annotated[int, typer.Option(help="Images that are timed.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="How often they are timed.", min=1)] = 5,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 8,
    fit_steps: Annotated[int, typer.Option(help="Batches that DTEM is fitted on.", min=1)] = 100,
    scales: Annotated[int, typer.Option(help="Patch sizes of adaptive models, the base size included.", min=2)] = 2,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("evaluation"),
    name: Annotated[str, typer.Option(help="Name of the files.")] = "accuracy",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the files hold already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods on your photos: accuracy, agreement with the uniform model, tokens, GFLOPs and time.

    Writes NAME.json after each row, so that an interrupted run goes on where it stopped; in the end NAME.md and a plot.

    Example: `aptvit evaluate val/labels.csv --model vit_base_patch16_384 --methods apt-embedding,tome,downscale`
    """
    import torch

    from aptvit.evaluation.methods import DEFAULT_METHODS, Conditions, parse_methods
    from aptvit.evaluation.report import as_tables, write_results
    from aptvit.evaluation.run import run_evaluation
    from aptvit.evaluation.training_run import is_run
    from aptvit.files.images import find_images
    from aptvit.hosts.pretrained import check_model, load_host

    if task != "classification":
        if methods not in (None, "downscale"):
            raise ValueError(f"--methods {methods!r}: a detector or segmenter is compared with 'downscale' alone")
        shares = as_list("keep", keep, float) if methods else []
        _evaluate_dense(photos, task, Path(model), shares, rounds, checked_device(device), as_json)
        return
    if is_run(photos):
        _evaluate_run(photos, batch_size, rounds, checked_device(device), as_json)
        return
    check_model(model)
    chosen = parse_methods(
        as_list("methods", methods, str) if methods else DEFAULT_METHODS, as_list("keep", keep, float)
    )
    check_writable(out)
    conditions = Conditions(
        dtype=getattr(torch, dtype),
        device=checked_device(device),
        batch_size=batch_size,
        timed_photos=timed_photos,
        rounds=rounds,
        scales=scales,
        max_photos=max_photos,
        fit_steps=fit_steps,
        calibration=None if calibrate_on is None else tuple(find_images([calibrate_on])),
    )
    with Bars(Console(stderr=True)) as bars:
        record = run_evaluation(
            photos,
            partial(load_host, model, checkpoint),
            model,
            chosen,
            out / f"{name}.json",
            sizes=[None] if sizes is None else as_list("sizes", sizes, int),
            conditions=conditions,
            command=shlex.join(["aptvit", *sys.argv[1:]]),
            fresh=fresh,
            progress=bars,
            done=_print_row,
        )
    written = write_results(record, out, name)
    errors = Console(stderr=True)
    for message in record.skipped:
        errors.print(f"skipped: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print((out / f"{name}.json").read_text(encoding="utf-8"))
        return
    console = Console()
    console.print(as_tables(record))
    console.print(f"Files: {', '.join(map(str, written))}", soft_wrap=True, markup=False, highlight=False)


def _evaluate_run(run: Path, batch_size: int, rounds: int, device: str, as_json: bool) -> None:
    """How good and how fast the model of a training is."""
    from aptvit.evaluation.training_run import evaluate_run

    _show(evaluate_run(run, batch_size, rounds, device), "On images set aside", as_json)


def _evaluate_dense(
    data: Path, task: str, run: Path, shares: Sequence[float], rounds: int, device: str, as_json: bool
) -> None:
    """How good and how fast a detector or a segmenter is on other pictures than it was trained with."""
    from aptvit.dense.saved import from_pretrained
    from aptvit.evaluation.dense import evaluate_dense
    from aptvit.evaluation.training_run import read_recipe, sources_of

    dense = from_pretrained(run)
    if dense.task != task:
        raise ValueError(f"{run} does {dense.task}, not {task}")
    images, evaluation = sources_of(str(data), replace(read_recipe(run), hold_back=0.0))  # nothing is trained here
    files, title = evaluation or images, f"On {data}"
    rows = evaluate_dense(dense, files, shares or None, rounds, device)
    named: list[dict[str, float | str]] = [{"method": name, **row} for name, row in rows.items()]
    _show(named if shares else list(rows.values()), title, as_json)


def _show(results: Sequence[Mapping[str, float | str]], title: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2))
        return
    table = Table(title=f"{title}; speed-up beside the uniform model", show_header=False)
    for name in results[0]:
        values = [row[name] for row in results]
        table.add_row(name, *(value if isinstance(value, str) else f"{value:.4g}" for value in values))
    Console().print(table)


def _print_row(row: EvaluationRow) -> None:
    """One line for each row as it is done: long runs are watched."""
    found = row.error or f"{row.tokens:.1%} of the tokens, {row.time.median:.2f} of the time"
    line = f"{row.size} px, {row.method}: {found}"
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
