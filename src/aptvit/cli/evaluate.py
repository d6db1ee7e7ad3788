"""`aptvit evaluate`: accuracy and measured time of adaptive patches and of baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.checks import (
    as_list,
    check_file,
    check_run,
    check_writable,
    checked_device,
    find_readable,
    is_saved,
    only_options,
    require,
)
from aptvit.cli.options import (
    KEEPS,
    MODEL,
    BatchSizeOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    FreshOption,
    JsonOption,
    KeepsOption,
    ModelOption,
    NameOption,
    OutOption,
    RoundsOption,
    RunOption,
    ScalesOption,
    SizesOption,
    ValSplitOption,
)
from aptvit.cli.output import (
    FAILED,
    ProgressBars,
    command_line,
    finish,
    print_json,
    print_line,
    print_message,
    print_problem,
)

if TYPE_CHECKING:
    from aptvit.evaluation.record import EvaluationRow


def evaluate(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder of images, with a labels.csv or one folder per class to report accuracy; the labels "
            "file itself (columns file and class_index); or the folder of a training.",
            metavar="DATA",
        ),
    ],
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    task: Annotated[
        Literal["classification", "detection", "segmentation"],
        typer.Option(
            help="With detection or segmentation, evaluates the training in --run on a folder with boxes or masks."
        ),
    ] = "classification",
    run: RunOption = None,
    val: ValSplitOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names of methods, each run at every share of --keeps, or name@value: apt-SCORER, "
            "apt-SCORER-global, random, resize, downscale, tome, tome-flash, evit, dtem, dtem-flash; with --task only "
            "downscale.",
            metavar="A,B@8",
        ),
    ] = None,
    keeps: KeepsOption = KEEPS,
    sizes: SizesOption = None,
    scales: ScalesOption = None,
    calibrate_on: Annotated[
        Path | None,
        typer.Option(help="Images to calibrate methods on; by default those that are evaluated.", metavar="PATH"),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(help="Use only this number of images, spread evenly.", min=1)
    ] = None,
    timed_images: Annotated[int, typer.Option(help="Number of images that are timed.", min=1)] = 64,
    rounds: RoundsOption = None,
    batch_size: BatchSizeOption = None,
    fit_steps: Annotated[int, typer.Option(help="Number of batches that DTEM is fitted on.", min=1)] = 100,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    out: OutOption = None,
    name: NameOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on your images: accuracy, agreement with the uniform model, tokens, GFLOPs and time.

    Writes NAME.json after each row, so an interrupted run continues where it stopped; at the end writes NAME.md and a
    plot.

    Example: `aptvit evaluate val/labels.csv --model vit_base_patch16_384 --methods apt-embedding,tome,downscale`; for a
    training `aptvit evaluate run`, or on other data `aptvit evaluate cells/ --task detection --run adaptive`
    """
    if not data.exists():
        raise ValueError(f"{data} does not exist: name a folder of images, a labels file, or the folder of a training")
    check_file("checkpoint", checkpoint)
    shares = as_list("keeps", keeps, float)
    of_all = ("data", "max_images", "rounds", "device", "out", "name", "as_json")
    if task != "classification":
        only_options(context, f"--task {task}", *of_all, "task", "run", "val", "methods", "keeps")
        if methods not in (None, "downscale"):
            raise ValueError(f"--methods {methods!r}: a detector or segmenter can only be compared with 'downscale'")
        require("dense", "accelerate", "torchmetrics", "yaml", "transformers", "faster_coco_eval")
        folder = check_run("run", run)

        from aptvit.evaluation.training_run import evaluate_run_on

        options: dict[str, Any] = {"device": checked_device(device), "max_images": max_images, "split": val}
        options["report"] = print_problem
        rows = evaluate_run_on(str(data), folder, task, shares if methods else [], rounds or 5, **options)
        _print_rows(rows, f"On {data}", as_json, out, name)
        return
    only_options(context, "--task classification", excluded=["run"])
    if (data / "run.json").is_file():
        only_options(context, "the folder of a training", *of_all, "batch_size")
        require("train", "accelerate", "torchmetrics", "yaml")

        from aptvit.evaluation.training_run import evaluate_run

        rows = evaluate_run(data, batch_size or 8, rounds or 5, checked_device(device), max_images, print_problem)
        _print_rows(rows, "On validation images", as_json, out, name)
        return
    if val is not None:
        from aptvit.datasets.splits import resolve

        data = resolve(data, val)
    if data.is_dir():
        from aptvit.files.images import find_images

        find_images([data])  # a folder without any is told before a model is loaded
    calibration = _calibration_images(calibrate_on)
    folder = out or Path("evaluate")
    check_writable(folder)

    import torch

    from aptvit.api import load_model
    from aptvit.evaluation.methods import DEFAULT_METHODS, SAVED, Conditions, parse_methods
    from aptvit.evaluation.report import as_tables, write_results
    from aptvit.evaluation.run import run_evaluation
    from aptvit.hosts.pretrained import check_model

    defaults: Sequence[str] = DEFAULT_METHODS
    if is_saved(model):
        defaults = (SAVED.name, *(name for name in DEFAULT_METHODS if not name.startswith("apt")))
    else:
        check_model(model)
    parsed = parse_methods(as_list("methods", methods, str) if methods else defaults, shares)
    device = checked_device(device)
    name = name or device.replace(":", "")
    conditions = Conditions(
        dtype=getattr(torch, dtype),
        device=device,
        batch_size=batch_size or 8,
        timed_images=timed_images,
        rounds=rounds or 5,
        scales=scales or 2,
        max_images=max_images,
        fit_steps=fit_steps,
        calibration=calibration,
    )
    with ProgressBars() as bars:
        record = run_evaluation(
            data,
            partial(load_model, model, checkpoint),
            model,
            parsed,
            folder / f"{name}.json",
            sizes=[None] if sizes is None else as_list("sizes", sizes, int),
            conditions=conditions,
            command=command_line(),
            fresh=fresh,
            progress=bars,
            done=_print_row,
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


def _calibration_images(images: Path | None) -> tuple[Path, ...] | None:
    return None if images is None else tuple(find_readable([images]))


def _print_rows(
    rows: Sequence[Mapping[str, float | str]], title: str, as_json: bool, out: Path | None, name: str | None
) -> None:
    """Print a table with a column for each row; with a folder or a name also write the rows as JSON."""
    if out is not None or name is not None:
        from aptvit.storage.writing import write_json

        folder = out or Path("evaluate")
        check_writable(folder)
        file = folder / f"{name or 'evaluation'}.json"
        write_json(file, rows)
        print_message(f"Written: {file}")
    if as_json:
        print_json(rows)
        return
    table = Table(title=f"{title}; speed-up over the uniform model", show_header=False)
    for name in rows[0]:
        values = [row[name] for row in rows]
        table.add_row(name, *(value if isinstance(value, str) else f"{value:.4g}" for value in values))
    Console().print(table)


def _print_row(row: EvaluationRow) -> None:
    """Print a line for each finished row, because runs are long."""
    result = row.error or f"{row.tokens:.1%} of the tokens, {row.time.median:.2f} of the time"
    print_message(f"{row.size} px, {row.method}: {result}")
