"""`aptvit export`: a graph from a picture's pixels to logits, checked on your photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import AsJson, ScorerName, as_numbers, check_writable


def export(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Images, and folders of images, to find the thresholds on and to check the graph with; by default "
            "those that scikit-image and scikit-learn install.",
            metavar="PHOTOS...",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="timm's name of the model, or a folder that a training or save_pretrained wrote.")
    ] = "vit_base_patch16_384",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.", min=1)] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the patch tokens to keep, 0.5 by default.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Thresholds from fine to coarse instead.", metavar="5.5,4.0")
    ] = None,
    scorer: Annotated[ScorerName, typer.Option(help="entropy, laplacian or upsample.")] = "entropy",
    scales: Annotated[int, typer.Option(help="Patch sizes, the base size included.", min=2)] = 2,
    format: Annotated[Literal["onnx", "torch-export"], typer.Option(help="What to write.")] = "onnx",
    apart: Annotated[bool, typer.Option("--apart", help="Two graphs: which patches, and from them to logits.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also a graph with 8-bit weights (dynamic quantisation), beside the other.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the graphs.")] = Path("exported"),
    as_json: AsJson = False,
) -> None:
    """Write a graph whose number of tokens follows from the picture, and compare it with the model on your photos.

    Example: `aptvit export photos/ --model vit_base_patch16_384 --keep 0.5 --format onnx --out exported`
    """
    from aptvit.export.check import Wanted, export_and_check

    if format == "torch-export" and (apart or int8):
        raise ValueError("--apart and --int8 are of ONNX: use --format onnx")
    if keep is not None and thresholds is not None:
        raise ValueError(f"--keep {keep:g} and --thresholds {thresholds}: give one, each decides what is merged")
    check_writable(out)
    wanted = Wanted(model, checkpoint, img_size, keep, as_numbers(thresholds), scorer, scales)
    checks = export_and_check(wanted, photos or [], format, apart, int8, out)
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    else:
        console = Console()
        table = Table(title=f"Beside the model, on {checks[0].photos} photos")
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
        console.print(table)
    exact = checks[0]
    if exact.largest_error > 1e-2 and exact.same_patches == 1:
        raise ValueError(f"{exact.files} differs from the model by {exact.largest_error:.2g}: do not use it, report it")
