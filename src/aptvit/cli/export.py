"""`aptvit export`: a graph from the pixels of an image to logits, checked on your images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import (
    FAILED,
    MODEL,
    AsJson,
    Checkpoint,
    ImgSize,
    Keep,
    Model,
    Out,
    Scales,
    Scorer,
    SomeImages,
    Thresholds,
    as_numbers,
    check_budget,
    check_file,
    check_writable,
    print_json,
    require,
    say,
)


def export(
    images: SomeImages = None,
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    keep: Keep = None,
    thresholds: Thresholds = None,
    scales: Scales = None,
    scorer: Scorer = "entropy",
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="What to write.")] = "onnx",
    apart: Annotated[bool, typer.Option("--apart", help="Two graphs: which patches, and from them to logits.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also a graph with 8-bit weights (dynamic quantisation), beside the other.")
    ] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Write a graph whose number of tokens follows from the image, and compare it with the model on your images.

    Thresholds for --keep are found on these images.

    Example: `aptvit export photos/ --model vit_base_patch16_384 --keep 0.5 --format onnx --out exported`
    """
    from aptvit.files.images import find_images

    if format == "onnx":
        require("export", "onnx", "onnxscript", "onnxruntime")
    elif apart or int8:
        raise ValueError("--apart and --int8 are of ONNX: use --format onnx")
    check_file("checkpoint", checkpoint)
    check_budget(thresholds, keep, scales=scales)
    if images:
        find_images(images)
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
        in_parts=apart,
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
        table = Table(title=f"Beside the model, on {checks[0].photos} images")
        for heading in ("graph", "MB", "same answer", "logits differ by", "same patches", "tokens"):
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
        say(f"{exact.files} differs from the model by {exact.largest_error:.2g}: do not use it, report it", "red")
        raise typer.Exit(FAILED)
