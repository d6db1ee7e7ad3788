"""`aptvit embed`: features or predictions of any number of images, as Parquet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aptvit.cli.options import (
    FAILED,
    MODEL,
    AsJson,
    Bars,
    Checkpoint,
    Config,
    Device,
    Dtype,
    Keep,
    Model,
    Thresholds,
    as_numbers,
    check_budget,
    check_file,
    checked_device,
    print_json,
    print_line,
    require,
)


def embed(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, *.tar shards or Parquet files, one such file, or a .txt file with a path or URL "
            "in each line; on this machine, or behind any URL that fsspec reads.",
            metavar="SOURCE",
        ),
    ],
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    keep: Keep = None,
    thresholds: Thresholds = None,
    config: Config = None,
    output: Annotated[
        Literal["pooled", "map", "predictions"],
        typer.Option(help="Pooled features, the feature map of the last block, or the top five classes."),
    ] = "pooled",
    pack_tokens: Annotated[int, typer.Option(help="Tokens that the model reads at a time.", min=1)] = 8192,
    part_size: Annotated[int, typer.Option(help="Images of a file; at most these are lost, if killed.", min=1)] = 256,
    dtype: Dtype = "float32",
    device: Device = None,
    threads: Annotated[int, typer.Option(help="Threads that read and decode images, without Ray.", min=1)] = 2,
    actors: Annotated[int, typer.Option(help="On Ray: processes that hold the model; 0 for no Ray.", min=0)] = 0,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster (auto, ray://host:10001); an actor for each of its GPUs.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the results; one named after the command by default.", metavar="FOLDER"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Features or predictions of any number of images, with the tokens of each; an image that fails is a row with its
    error.

    Every image keeps the fraction of --keep. The results are Parquet files; --out may be a URL that fsspec writes.
    Kill it at any time: the same command continues, and no image is missing or doubled.

    Example: `aptvit embed photos/ --model vit_base_patch16_384 --keep 0.5 --out features`, then
    `pyarrow.dataset.dataset("features").to_table()`
    """
    require("bulk", "fsspec", "pyarrow")
    if actors or address:
        require("ray", "ray")
    check_file("checkpoint", checkpoint)
    check_budget(thresholds, keep, config=config)
    if "://" not in source and not Path(source).exists():
        raise ValueError(f"{source} does not exist: give a folder, a file, or a URL that fsspec reads")

    from aptvit.bulk import Job, Options, run_here, run_on_ray
    from aptvit.bulk.embedder import adaptation_settings

    settings = adaptation_settings(model, keep, as_numbers(thresholds), config)
    file = None if checkpoint is None else str(checkpoint.resolve())
    job = Job(source, Options(model, file, settings, output, pack_tokens, dtype), out or "embed", part_size)
    started, missing = time.perf_counter(), job.missing()
    remaining = sum(len(job.part(number)) for number in missing)
    with Bars() as bars:
        done = bars.counter("images", len(job.entries), len(job.entries) - remaining)
        if actors or address:
            run_on_ray(job, address, actors or 1, done)
        else:
            run_here(job, checked_device(device), threads, done)
    summary: dict[str, Any] = {**job.summary(), "images_per_second": remaining / (time.perf_counter() - started)}
    if as_json:
        print_json(summary)
    else:
        share = summary["tokens"] / max(summary["uniform_tokens"], 1)
        speed = f", {summary['images_per_second']:.1f} images/s" if missing else ", all there before"
        counts = f"{summary['images']} images, {summary['errors']} with an error, {share:.1%} of the tokens"
        print_line(f"{counts}{speed}: {out or 'embed'}")
    if summary["errors"]:
        raise typer.Exit(FAILED)
