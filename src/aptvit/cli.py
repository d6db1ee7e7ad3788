"""The command line: compare, benchmark, show, models."""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from aptvit.benchmark_record import Record, Row
    from aptvit.budget import Wish

T = TypeVar("T")

app = typer.Typer(
    name="aptvit",
    help="Adaptive patch sizes for pretrained Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ScorerName = Literal["entropy", "laplacian", "upsample"]
Paths = Annotated[list[Path], typer.Argument(help="Photos, and folders of photos.", metavar="PHOTOS...")]
Thresholds = Annotated[
    str | None,
    typer.Option(help="Thresholds from fine to coarse, one for each size above the base patch.", metavar="5.5 4.0"),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Share of the patch tokens to keep, 0.5 by default; thresholds are found on these photos."),
]
PerImage = Annotated[bool, typer.Option("--per-image", help="Give every photo that share, not only their average.")]
Scales = Annotated[int | None, typer.Option(help="Patch sizes, the base size included.", min=1, max=6)]
ScorerOption = Annotated[ScorerName, typer.Option(help="What decides where patches may be big.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output, everything else to standard error.")
]


class _NumbersAfterThresholds(typer.core.TyperCommand):
    """Lets ``--thresholds 5.5 4.0`` take all numbers that follow."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", arg) and "--thresholds" in (joined[-1:] + joined[-2:-1]):
                if joined[-1] == "--thresholds":
                    joined.append(arg)
                else:
                    joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


@app.command(cls=_NumbersAfterThresholds)
def compare(
    photos: Paths,
    model: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_base_patch16_384",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.", min=1)] = None,
    thresholds: Thresholds = None,
    keep: Keep = None,
    per_image: PerImage = False,
    scales: Scales = None,
    scorer: ScorerOption = "entropy",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Photos per batch.", min=1)] = 8,
    rounds: Annotated[int | None, typer.Option(help="Timed rounds over all photos.", min=1)] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV with the columns file and class_index, for accuracies.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Photos to show in the report.", min=0)] = 24,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Run a model uniform and adaptive side by side on your photos, and write a report.

    Example: `aptvit compare holiday/ --model vit_base_patch16_384 --keep 0.5 --out report`
    """
    import torch

    from aptvit.compare import compare as run
    from aptvit.compare import read_photos
    from aptvit.hosts import load_host
    from aptvit.images import find_images
    from aptvit.report import summary_table, write_report

    console = Console(stderr=as_json)
    _check_writable(out)
    device = _checked_device(device)
    files = find_images(photos)
    wish = _wish(thresholds, keep, per_image, scales, default_scales=2)
    with _Bars(Console(stderr=True)) as bars:
        host = load_host(model, checkpoint, img_size)
        if host.weights == "random":
            console.print("The hub gave no weights: they are random, so speed is real and agreement is not shown.")
        read = read_photos(files, host.data, bars)
        result = run(
            host,
            model,
            read,
            wish,
            scorer=scorer,
            dtype=getattr(torch, dtype),
            device=device,
            batch_size=batch_size,
            rounds=rounds,
            labels=None if labels is None else _read_labels(labels, read.paths),
            num_pictures=pictures,
            command=shlex.join(["aptvit", *sys.argv[1:]]),
            progress=bars,
        )
    page = write_report(result, out)
    for message in result.skipped:
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False)
    if as_json:
        print(json.dumps({**result.to_dict(), "report": str(page)}, indent=2))
    else:
        console.print(summary_table(result))
        console.print(f"Report: {page}", soft_wrap=True)


@app.command()
def benchmark(
    photos: Annotated[
        list[Path] | None,
        typer.Argument(help="Photos, and folders of photos; example photos by default.", metavar="[PHOTOS...]"),
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
    from aptvit.benchmark import run_benchmark
    from aptvit.benchmark_record import Case
    from aptvit.images import find_images
    from aptvit.sample_photos import write_sample_photos

    _check_writable(out)
    device = _checked_device(device)
    cases = [
        Case(model, size, kind, images, share, "train" if train else "infer", device, scales, compiled, at, max_photos)
        for model in _list("models", models, str)
        for size in (_list("sizes", sizes, int) if sizes is not None else [None])
        for kind in _list("dtype", dtype, str)
        for images in _list("batch", batch, int)
        for share in _list("keep", keep, float)
        for at in [thresholds_from_size]
    ]
    name = name or device.replace(":", "")
    with tempfile.TemporaryDirectory() as folder, _Bars(Console(stderr=True)) as bars:
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


@app.command(cls=_NumbersAfterThresholds)
def show(
    photos: Paths,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("patches"),
    scores: Annotated[bool, typer.Option("--scores", help="Put the score map of each scale beside the photo.")] = False,
    patch_size: Annotated[int, typer.Option(help="Side of a base patch in pixels.", min=2)] = 16,
    img_size: Annotated[
        int, typer.Option(help="Longer side of the photo in pixels, as cut into patches.", min=1)
    ] = 384,
    thresholds: Thresholds = None,
    keep: Keep = None,
    per_image: PerImage = False,
    scales: Scales = None,
    scorer: ScorerOption = "entropy",
    as_json: AsJson = False,
) -> None:
    """Draw the patches of photos, without any model.

    Example: `aptvit show cat.jpg --thresholds 5.5 4.0 --scores --out patches`
    """
    from aptvit.images import find_images
    from aptvit.show import show_patches

    _check_writable(out)
    files = find_images(photos)
    wish = _wish(thresholds, keep, per_image, scales, default_scales=3)
    with _Bars(Console(stderr=True)) as bars:
        shown = show_patches(files, out, wish, patch_size, img_size, scorer, scores, bars)
    for message in shown.skipped:
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False)
    if as_json:
        print(json.dumps(shown.to_dict(), indent=2))
        return
    for picture in shown.pictures:
        print(f"{picture.path}  {picture.tokens} of {picture.tokens_uniform} tokens ({picture.keep_ratio:.0%})")


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with *.")] = "*",
    everything: Annotated[bool, typer.Option("--all", help="Also list what cannot be adapted, and why.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the timm models that can be adapted.

    Example: `aptvit models "*dinov3*"`
    """
    from aptvit.adapters.catalogue import as_markdown, as_table, describe_model, model_names

    names = model_names(pattern)
    if not names:
        raise ValueError(f"no Vision Transformer of timm's matches {pattern!r}: try a part of a name, or '*'")
    with _Bars(Console(stderr=True)) as bars:
        entries = [describe_model(name) for name in bars(names, "building models", len(names))]
    if as_json:
        print(
            json.dumps(
                [{"name": e.name, "adaptable": e.reason is None, "reason": e.reason, **e.traits} for e in entries]
            )
        )
    elif markdown:
        print(as_markdown(entries))
    else:
        Console().print(as_table(entries, everything))


class _Bars:
    """Progress bars on standard error, one for each piece of work."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, steps: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        return self._progress.track(steps, total=total, description=what)


def _wish(thresholds: str | None, keep: float | None, per_image: bool, scales: int | None, default_scales: int) -> Wish:
    from aptvit.budget import Wish

    if thresholds is not None and (keep is not None or per_image):
        raise ValueError(f"--thresholds {thresholds} and --keep or --per-image: give one, each decides what is merged")
    numbers = _numbers(thresholds)
    if numbers is None:
        return Wish(keep=0.5 if keep is None else keep, per_image=per_image, scales=scales or default_scales)
    if scales is not None and scales != len(numbers) + 1:
        raise ValueError(
            f"--thresholds {thresholds} with --scales {scales}: give one threshold for each size above the base patch"
        )
    return Wish(thresholds=numbers, scales=len(numbers) + 1)


def _list(option: str, words: str, kind: Callable[[str], T]) -> list[T]:
    """Values separated by commas or spaces, each once."""
    try:
        values = [kind(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--{option} {words}: give numbers, separated by commas") from None
    if not values:
        raise ValueError(f"--{option} is empty: give at least one value")
    return list(dict.fromkeys(values))


def _print_row(row: Row) -> None:
    """One line for each case as it is done: long runs are watched."""
    case = row.case
    found = row.error or f"{row.speedup.median:.2f} times faster, eta {row.eta:.2f}"
    line = f"{case.model} {case.size or ''} {case.dtype} batch {case.batch} keep {case.keep:g} {case.mode}: {found}"
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _write_benchmark(record: Record, out: Path, name: str) -> None:
    from aptvit.benchmark_report import as_markdown, as_table, write_plots

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
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False)
    console.print(as_table(record))
    console.print(f"Files: {', '.join(map(str, written))}", soft_wrap=True)
    if missing:
        console.print(missing, soft_wrap=True, markup=False)


def _numbers(thresholds: str | None) -> tuple[float, ...] | None:
    if thresholds is None:
        return None
    try:
        return tuple(float(part) for part in thresholds.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--thresholds {thresholds}: give numbers, from fine to coarse, such as 5.5 4.0") from None


def _check_writable(folder: Path) -> None:
    """Find out before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".aptvit-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None


def _checked_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _read_labels(file: Path, photos: list[Path]) -> list[int]:
    """The class of each photo, by file name."""
    if not file.is_file():
        raise ValueError(f"there is no labels file {file}")
    with file.open(newline="") as lines:
        rows = csv.DictReader(lines)
        if not {"file", "class_index"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} must have the columns file and class_index; it has {rows.fieldnames}")
        classes = {row["file"]: int(row["class_index"]) for row in rows}
    missing = [path.name for path in photos if path.name not in classes]
    if missing:
        raise ValueError(f"{file} has no class for {len(missing)} of {len(photos)} photos, such as {missing[0]}")
    return [classes[path.name] for path in photos]


def main() -> None:
    """Entry point: a wrong value is one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"aptvit: {error}", file=sys.stderr)
        raise SystemExit(2) from None
