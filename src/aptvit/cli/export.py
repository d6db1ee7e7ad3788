"""`aptvit export`: write a model as a graph from pixels to logits, and compare the graph with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.checks import as_numbers, check_budget, check_file, check_writable, find_readable, require
from aptvit.cli.options import (
    MODEL,
    CheckpointOption,
    ImgSizeOption,
    JsonOption,
    KeepOption,
    ModelOption,
    OptionalImagesArgument,
    OutOption,
    ScalesOption,
    ScorerOption,
    ThresholdsOption,
)
from aptvit.cli.output import FAILED, print_json, print_message


def export(
    images: OptionalImagesArgument = None,
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    keep: KeepOption = None,
    thresholds: ThresholdsOption = None,
    scales: ScalesOption = None,
    scorer: ScorerOption = "entropy",
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="Format of the files.")] = "onnx",
    in_parts: Annotated[
        bool,
        typer.Option("--in-parts", help="Write two graphs: one selects patches, the other computes logits from them."),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also write a graph with 8-bit weights (dynamic quantisation).")
    ] = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a graph whose number of tokens depends on the image, and compare it with the model on your images.

    Thresholds for --keep are calibrated on these images.

    Example: `aptvit export images/ --model vit_base_patch16_384 --keep 0.5 --format onnx --out exported`
    """
    if format == "onnx":
        require("export", "onnx", "onnxscript", "onnxruntime")
    elif in_parts or int8:
        raise ValueError("--in-parts and --int8 are options of ONNX: use --format onnx")
    check_file("checkpoint", checkpoint)
    check_budget(thresholds, keep, scales=scales)
    if images:
        find_readable(images)
    else:
        require("demo", "skimage", "sklearn")
    folder = out or Path("export")
    check_writable(folder)

    from aptvit.export.check import export_and_check

    checks = export_and_check(
        model,
        images or [],
        folder,
        format=format,
        in_parts=in_parts,
        int8=int8,
        checkpoint=checkpoint,
        img_size=img_size,
        keep=keep,
        thresholds=as_numbers(thresholds),
        scorer=scorer,
        scales=scales or 2,
    )
    if as_json:
        print_json([vars(check) for check in checks])
    else:
        table = Table(title=f"Compared with the model, on {checks[0].photos} images")
        for heading in ("graph", "MB", "agreement", "largest error of logits", "same patches", "tokens"):
            table.add_column(heading, justify="right" if table.columns else "left")
        for check in checks:
            table.add_row(
                check.files,
                f"{check.megabytes:.1f}",
                f"{check.agreement:.1%}",
                f"{check.largest_error:.2g}",
                f"{check.same_patches:.1%}",
                f"{check.tokens:.1%}",
            )
        Console().print(table)
    exact = checks[0]
    if exact.largest_error > 1e-2 and exact.same_patches == 1:
        error = f"{exact.largest_error:.2g}"
        print_message(f"{exact.files} differs from the model by {error}: do not use it, report it", "red")
        raise typer.Exit(FAILED)
