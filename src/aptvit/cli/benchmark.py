"""`aptvit benchmark`: what adaptive patches save on this machine."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aptvit.cli.options import (
    FAILED,
    KEEPS,
    MODEL,
    AsJson,
    Bars,
    Device,
    Fresh,
    Keeps,
    Name,
    Out,
    Rounds,
    Scales,
    Sizes,
    SomeImages,
    as_list,
    check_writable,
    checked_device,
    command_line,
    finish,
    print_line,
    require,
    say,
)

if TYPE_CHECKING:
    from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Mode


def benchmark(
    images: SomeImages = None,
    models: Annotated[str, typer.Option(help="Names of timm models.", metavar="A,B")] = MODEL,
    sizes: Sizes = None,
    keeps: Keeps = KEEPS,
    scales: Scales = None,
    batch_sizes: Annotated[str, typer.Option(help="Images per batch.", metavar="1,8")] = "8",
    dtypes: Annotated[
        str, typer.Option(help="Types to compute in: float32, bfloat16, float16.", metavar="A,B")
    ] = "float32",
    thresholds_from_size: Annotated[
        int | None, typer.Option(help="Find the thresholds at this size and use them at all sizes.", min=1)
    ] = None,
    first: Annotated[int | None, typer.Option(help="Use only that many images, the first ones.", min=1)] = None,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps instead of inference.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Try torch.compile too, and take the faster way for each model.")
    ] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Try CUDA graphs too: for small batches on a GPU.")] = False,
    device: Device = None,
    rounds: Rounds = None,
    out: Out = None,
    name: Name = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Measure speed: uniform against adaptive, for every combination of the lists. A fraction of 1.0 scores, and merges
    nothing.

    Writes NAME.json after each case, so that an interrupted run continues where it stopped; at the end NAME.md and
    plots.

    Example: `aptvit benchmark --models vit_base_patch16_384 --keeps 1.0,0.5 --batch-sizes 1,8 --out results --name cpu`
    """
    from aptvit.files.images import find_images
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
    files = find_images(images) if images else None
    folder = out or Path("benchmark")
    check_writable(folder)

    from aptvit.benchmark.record import Case
    from aptvit.benchmark.run import run_benchmark

    place = checked_device(device)
    mode: Mode = "train" if train else "infer"
    cases = [
        Case(
            *values,
            mode=mode,
            device=place,
            scales=scales or 2,
            compiled=compiled,
            thresholds_from=thresholds_from_size,
            max_photos=first,
            graphs=graphs,
        )
        for values in product(*lists)
    ]
    name = name or place.replace(":", "")
    with tempfile.TemporaryDirectory() as samples, Bars() as bars:
        record = run_benchmark(
            cases,
            files or write_sample_photos(Path(samples)),
            folder / f"{name}.json",
            rounds=rounds or 5,
            command=command_line(),
            fresh=fresh,
            progress=bars,
            done=_say_row,
        )
    _write(record, folder, name, as_json)
    finish(record.skipped)
    if any(row.error for row in record.rows):
        raise typer.Exit(FAILED)


def _say_row(row: BenchmarkRow) -> None:
    """A line for each case as it is done: long runs are watched."""
    case = row.case
    found = row.error or f"{row.speedup.median:.2f} times faster, eta {row.eta:.2f}"
    say(f"{case.model} {case.size or ''} {case.dtype} batch {case.batch} keep {case.keep:g} {case.mode}: {found}")


def _write(record: BenchmarkRecord, out: Path, name: str, as_json: bool) -> None:
    from aptvit.benchmark.report import as_markdown, as_table, write_plots

    page = out / f"{name}.md"
    page.write_text(as_markdown(record), encoding="utf-8")
    written = [out / f"{name}.json", page]
    try:
        written += write_plots(record, out, name)
    except ImportError:
        say("No plots without matplotlib: pip install 'aptvit[plot]' gives them.")
    if as_json:
        print(written[0].read_text(encoding="utf-8"))
        return
    Console().print(as_table(record))
    print_line(f"Files: {', '.join(map(str, written))}")
