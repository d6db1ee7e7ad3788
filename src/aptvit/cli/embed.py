"""`aptvit embed`: features or predictions of any number of images, as Parquet."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aptvit.cli.options import AsJson, as_numbers, checked_device


def embed(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, *.tar shards or Parquet files, one such file, or a .txt file with a path or URL "
            "in each line; here, or behind any URL that fsspec reads.",
            metavar="SOURCE",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="timm's name of the model, or a folder that a training or save_pretrained wrote.")
    ] = "vit_base_patch16_384",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the patch tokens of every image, 0.5 by default.")
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(help="Thresholds from fine to coarse instead: busy images keep more.", metavar="5.5,4.0"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="What `aptvit calibrate` wrote, instead of both.")] = None,
    output: Annotated[
        Literal["pooled", "map", "predictions"],
        typer.Option(help="Pooled features, the feature map of the last block, or the top five classes."),
    ] = "pooled",
    max_tokens: Annotated[int, typer.Option(help="Tokens that the model reads at a time.", min=1)] = 8192,
    part_size: Annotated[int, typer.Option(help="Images of a part: what is lost at most, if killed.", min=1)] = 256,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    threads: Annotated[int, typer.Option(help="That read and decode images, without Ray.", min=1)] = 2,
    actors: Annotated[int, typer.Option(help="On Ray: processes that hold the model; 0 for no Ray.", min=0)] = 0,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster (auto, ray://host:10001); one actor for each of its GPUs.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the Parquet files, or a URL that fsspec writes.")] = "features",
    as_json: AsJson = False,
) -> None:
    """Features or predictions of any number of images, with what each cost; what fails becomes a row with its error.

    Kill it whenever you like: the same command goes on, no image is missing or doubled.

    Example: `aptvit embed photos/ --model vit_base_patch16_384 --keep 0.5 --out features`, then
    `pyarrow.dataset.dataset("features").to_table()`
    """
    from aptvit.bulk import Job, Options, run_here, run_on_ray

    settings = _settings(model, keep, thresholds, config)
    file = None if checkpoint is None else str(checkpoint.resolve())
    options = Options(model, file, settings, output, max_tokens, dtype)
    job = Job(source, options, out, part_size)
    started, before = time.perf_counter(), len(job.missing())
    errors = Console(stderr=True)
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        left = sum(len(job.part(number)) for number in job.missing())
        task = progress.add_task("images", total=len(job.entries), completed=len(job.entries) - left)

        def done(number: int) -> None:
            progress.advance(task, number)

        if actors or address:
            run_on_ray(job, address, actors or 1, done)
        else:
            run_here(job, checked_device(device), threads, done)
    told: dict[str, Any] = {**job.summary(), "images_per_second": left / (time.perf_counter() - started)}
    if as_json:
        print(json.dumps(told, indent=2))
        return
    share = told["tokens"] / max(told["uniform_tokens"], 1)
    speed = f", {told['images_per_second']:.1f} images/s" if before else ", all there before"
    text = f"{told['images']} images, {told['errors']} with an error, {share:.1%} of the tokens{speed}: {out}"
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def _settings(model: str, keep: float | None, thresholds: str | None, config: Path | None) -> dict[str, Any] | None:
    given = [
        name for name, value in (("keep", keep), ("thresholds", thresholds), ("config", config)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"--{' and --'.join(given)}: give one of them")
    if config is not None:
        from aptvit.models.checkpoints import read_config

        return read_config(config)
    if thresholds is not None:
        return {"thresholds": list(as_numbers(thresholds) or ())}
    if Path(model).is_dir():
        return None if keep is None else {"keep": keep}
    return {"keep": 0.5 if keep is None else keep}
