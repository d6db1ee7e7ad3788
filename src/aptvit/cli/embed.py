"""`aptvit embed`: write features or predictions of any number of images to Parquet files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aptvit.cli.checks import as_numbers, check_budget, check_file, checked_device, require
from aptvit.cli.options import (
    MODEL,
    CheckpointOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    KeepOption,
    ModelOption,
    ThresholdsOption,
)
from aptvit.cli.output import FAILED, INTERRUPTED, ProgressBars, print_json, print_line, print_message


def embed(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images, *.tar shards or Parquet files, one such file, or a .txt file with a path or URL "
            "in each line; a path, or a URL that fsspec reads.",
            metavar="SOURCE",
        ),
    ],
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    keep: KeepOption = None,
    thresholds: ThresholdsOption = None,
    config: ConfigOption = None,
    output: Annotated[
        Literal["pooled", "map", "predictions"],
        typer.Option(help="Write pooled features, the feature map of the last block, or the top five classes."),
    ] = "pooled",
    format: Annotated[Literal["parquet", "csv"], typer.Option(help="Format of the files.")] = "parquet",
    pack_tokens: Annotated[
        int, typer.Option(help="Largest number of tokens in a pack that the model runs on.", min=1)
    ] = 8192,
    part_size: Annotated[int, typer.Option(help="Images per file; a killed process loses at most these.", min=1)] = 256,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    threads: Annotated[
        int, typer.Option(help="Number of threads that read and decode images; not used with Ray.", min=1)
    ] = 2,
    actors: Annotated[
        int, typer.Option(help="Number of Ray actors that hold the model; 0 runs without Ray.", min=0)
    ] = 0,
    address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster: auto, ray://host:10001. Actors use the GPUs of the cluster."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the results; by default the name of the command.", metavar="FOLDER"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write features or predictions of any number of images to Parquet or CSV files, a row for each image.

    A row has the numbers of tokens, or the error if the image cannot be read. Every image keeps the share of --keep.
    --out may be a URL that fsspec writes. If the command is killed, the same command continues: no image is missing or
    duplicated.

    Example: `aptvit embed images/ --model vit_base_patch16_384 --keep 0.5 --out features`, then
    `pyarrow.dataset.dataset("features").to_table()`
    """
    if format == "csv" and output != "predictions":
        raise ValueError(f"--format csv holds predictions, not {output}: add --output predictions")
    require("bulk", "fsspec", "pyarrow")
    if actors or address:
        require("ray", "ray")
    check_file("checkpoint", checkpoint)
    check_budget(thresholds, keep, config=config)
    if "://" not in source and not Path(source).exists():
        raise ValueError(f"{source} does not exist: give a folder, a file, or a URL that fsspec reads")

    from aptvit.bulk import Job, Options, run_here, run_on_ray
    from aptvit.bulk.embedder import adaptation_settings
    from aptvit.bulk.stopping import interrupted_by_signals

    settings = adaptation_settings(model, keep, as_numbers(thresholds), config)
    file = None if checkpoint is None else str(checkpoint.resolve())
    job = Job(source, Options(model, file, settings, output, pack_tokens, dtype), out or "embed", part_size, format)
    started, missing = time.perf_counter(), job.missing()
    remaining = sum(len(job.part(number)) for number in missing)
    try:
        with interrupted_by_signals(), ProgressBars() as bars:
            done = bars.counter("images", len(job.entries), len(job.entries) - remaining)
            if actors or address:
                run_on_ray(job, address, actors or 1, done)
            else:
                run_here(job, checked_device(device), threads, done)
    except KeyboardInterrupt:
        finished = len(job.entries) - sum(len(job.part(number)) for number in job.missing())
        print_message(f"stopped after {finished} of {len(job.entries)} images: the same command continues")
        raise typer.Exit(INTERRUPTED) from None
    summary: dict[str, Any] = {**job.summary(), "images_per_second": remaining / (time.perf_counter() - started)}
    if as_json:
        print_json(summary)
    else:
        share = summary["tokens"] / max(summary["uniform_tokens"], 1)
        speed = f", {summary['images_per_second']:.1f} images/s" if missing else ", all done before"
        counts = f"{summary['images']} images, {summary['errors']} with an error, {share:.1%} of the tokens"
        print_line(f"{counts}{speed}: {out or 'embed'}")
    if summary["errors"]:
        raise typer.Exit(FAILED)
