"""`aptvit benchmark`: what adaptive patches save on this machine."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aptvit.cli.options import Bars, as_list, check_writable, checked_device

if TYPE_CHECKING:
    from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow


def benchmark(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Images, and folders of images; example photos by default.", metavar="[PHOTOS...]"),
    ] = None,
    models: Annotated[str, typer.Option(help="timm's names.", metavar="A,B")] = "vit_base_patch16_384",
    sizes: Annotated[
        str | None, typer.Option(help="Sides of the input in pixels; each model's own by default.", metavar="224,384")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Shares of the patch tokens, on average; 1.0 scores and merges nothing.")
    ] = "1.0,0.65,0.55,0.45",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "8",
    dtype: Annotated[str, typer.Option(help="Types: float32, bfloat16, float16.")] = "float32",
    scales: Annotated[int, typer.Option(help="Patch sizes, the base size included.", min=2, max=6)] = 2,
    thresholds_from_size: Annotated[
        int | None, typer.Option(help="Find the thresholds at this size and use them at all sizes.", min=1)
    ] = None,
    max_photos: Annotated[int | None, typer.Option(help="Use only the first photos.", min=1)] = None,
    train: Annotated[bool, typer.Option("--train", help="Measure training steps instead of inference.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Try torch.compile too and take the faster way of each side.")
    ] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Try CUDA graphs too: for small batches on a GPU.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds over all photos.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmark"),
    name: Annotated[str | None, typer.Option(help="Name of the files; that of the device by default.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the files hold already.")] = False,
) -> None:
    """Measure speed: uniform against adaptive, for every combination of what is given.

    Writes NAME.json after each case, so that an interrupted run goes on where it stopped; in the end NAME.md and plots.

    Example: `aptvit benchmark --models vit_base_patch16_384 --keep 1.0,0.5 --batch 1,8 --out results --name cpu`
    """
    from aptvit.benchmark.record import Case, Mode
    from aptvit.benchmark.run import run_benchmark
    from aptvit.files.images import find_images
    from aptvit.files.sample_photos import write_sample_photos

    check_writable(out)
    device = checked_device(device)
    mode: Mode = "train" if train else "infer"
    cases = [
        Case(model, size, kind, images, share, mode, device, scales, compiled, at, max_photos, graphs)
        for model in as_list("models", models, str)
        for size in (as_list("sizes", sizes, int) if sizes is not None else [None])
        for kind in as_list("dtype", dtype, str)
        for images in as_list("batch", batch, int)
        for share in as_list("keep", keep, float)
        for at in [thresholds_from_size]
    ]
    name = name or device.replace(":", "")
    with tempfile.TemporaryDirectory() as folder, Bars(Console(stderr=True)) as bars:
        record = run_benchmark(
            cases,
            find_images(photos) if photos else write_sample_photos(Path(folder)),
            out / f"{name}.json",
            rounds=rounds,
            command=shlex.join(["aptvit", *sys.argv[1:]]),
            fresh=fresh,
            progress=bars,
            done=_print_row,
        )
    _write_benchmark(record, out, name)


def _print_row(row: BenchmarkRow) -> None:
    """One line for each case as it is done: long runs are watched."""
    case = row.case
    found = row.error or f"{row.speedup.median:.2f} times faster, eta {row.eta:.2f}"
    line = f"{case.model} {case.size or ''} {case.dtype} batch {case.batch} keep {case.keep:g} {case.mode}: {found}"
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _write_benchmark(record: BenchmarkRecord, out: Path, name: str) -> None:
    from aptvit.benchmark.report import as_markdown, as_table, write_plots

    console = Console()
    page = out / f"{name}.md"
    page.write_text(as_markdown(record), encoding="utf-8")
    written = [out / f"{name}.json", page]
    try:
        written += write_plots(record, out, name)
        missing = None
    except ImportError:
        missing = "No plots without matplotlib: pip install 'aptvit[plot]' gives them."
    for message in record.skipped:
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(as_table(record))
    console.print(f"Files: {', '.join(map(str, written))}", soft_wrap=True)
    if missing:
        console.print(missing, soft_wrap=True, markup=False)
