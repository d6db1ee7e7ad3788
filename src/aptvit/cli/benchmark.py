"""`aptvit benchmark`: speed and memory of adaptive patches on this machine."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aptvit.cli.checks import as_list, check_writable, checked_device, find_readable, require
from aptvit.cli.options import (
    KEEPS,
    MODEL,
    DeviceOption,
    FreshOption,
    JsonOption,
    KeepsOption,
    NameOption,
    OptionalImagesArgument,
    OutOption,
    RoundsOption,
    ScalesOption,
    SizesOption,
)
from aptvit.cli.output import FAILED, ProgressBars, command_line, finish, print_line, print_message

if TYPE_CHECKING:
    from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Mode


def benchmark(
    images: OptionalImagesArgument = None,
    models: Annotated[
        str,
        typer.Option(
            help="Names of timm models, with random weights; folders, or names on the hub, of other models.",
            metavar="A,B",
        ),
    ] = MODEL,
    sizes: SizesOption = None,
    keeps: KeepsOption = KEEPS,
    scales: ScalesOption = None,
    batch_sizes: Annotated[str, typer.Option(help="Images per batch.", metavar="1,8")] = "8",
    dtypes: Annotated[
        str, typer.Option(help="Floating-point types to compute in: float32, bfloat16, float16.", metavar="A,B")
    ] = "float32",
    thresholds_from_size: Annotated[
        int | None, typer.Option(help="Calibrate the thresholds at this size and use them at all sizes.", min=1)
    ] = None,
    first: Annotated[int | None, typer.Option(help="Use only this number of images, the first ones.", min=1)] = None,
    train: Annotated[bool, typer.Option("--training", help="Measure training steps instead of inference.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile, and report the faster variant of each model.")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Also time CUDA graphs, for small batches on a GPU.")
    ] = False,
    device: DeviceOption = None,
    rounds: RoundsOption = None,
    out: OutOption = None,
    name: NameOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the speed of uniform and adaptive models, for every combination of the lists. At a share of 1.0
    patches are scored, but none are merged.

    Writes NAME.json after each case, so an interrupted run continues where it stopped; at the end writes NAME.md and
    plots.

    Example: `aptvit benchmark --models vit_base_patch16_384 --keeps 1.0,0.5 --batch-sizes 1,8 --out results --name cpu`
    """
    from aptvit.files.sample_photos import write_sample_photos

    lists = (
        as_list("models", models, str),
        as_list("sizes", sizes, int) if sizes is not None else [None],
        as_list("dtypes", dtypes, str),
        as_list("batch-sizes", batch_sizes, int),
        as_list("keeps", keeps, float),
    )
    if not images:
        require("demo", "skimage", "sklearn")
    files = find_readable(images) if images else None
    folder = out or Path("benchmark")
    check_writable(folder)

    from aptvit.benchmark.record import Case
    from aptvit.benchmark.run import run_benchmark

    device = checked_device(device)
    mode: Mode = "train" if train else "infer"
    cases = [
        Case(
            *values,
            mode=mode,
            device=device,
            scales=scales or 2,
            compiled=compiled,
            thresholds_from=thresholds_from_size,
            max_photos=first,
            graphs=graphs,
        )
        for values in product(*lists)
    ]
    name = name or device.replace(":", "")
    with tempfile.TemporaryDirectory() as samples, ProgressBars() as bars:
        record = run_benchmark(
            cases,
            files or write_sample_photos(Path(samples)),
            folder / f"{name}.json",
            rounds=rounds or 5,
            command=command_line(),
            fresh=fresh,
            progress=bars,
            done=_print_row,
        )
    _write(record, folder, name, as_json)
    finish(record.skipped)
    if any(row.error for row in record.rows):
        raise typer.Exit(FAILED)


def _print_row(row: BenchmarkRow) -> None:
    """Print a line for each finished case, because runs are long."""
    case = row.case
    result = row.error or f"{row.speedup.median:.2f} times faster, eta {row.eta:.2f}"
    setting = f"{case.model} {case.size or ''} {case.dtype} batch {case.batch} keep {case.keep:g} {case.mode}"
    print_message(f"{setting}: {result}")


def _write(record: BenchmarkRecord, out: Path, name: str, as_json: bool) -> None:
    from aptvit.benchmark.report import as_markdown, as_table, write_plots
    from aptvit.storage.writing import write_text

    page = out / f"{name}.md"
    write_text(page, as_markdown(record))
    written = [out / f"{name}.json", page]
    try:
        written += write_plots(record, out, name)
    except ImportError:
        print_message("Plots need matplotlib: pip install 'aptvit[plot]'.")
    if as_json:
        print(written[0].read_text(encoding="utf-8"))
        return
    Console().print(as_table(record))
    print_line(f"Files: {', '.join(map(str, written))}")
