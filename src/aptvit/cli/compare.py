"""`aptvit compare`: a model uniform and adaptive side by side on your photos."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import (
    AsJson,
    Bars,
    Keep,
    Paths,
    PerImage,
    Scales,
    ScorerOption,
    Thresholds,
    as_list,
    as_wish,
    check_writable,
    checked_device,
)

if TYPE_CHECKING:
    import torch

    from aptvit.calibration.calibrator import Target
    from aptvit.compare.clips import ClipRow
    from aptvit.hosts.pretrained import Host


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
    config: Annotated[
        Path | None, typer.Option(help="What `aptvit calibrate` wrote, instead of all options about tokens.")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type to compute in.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 8,
    rounds: Annotated[int | None, typer.Option(help="Timed rounds over all photos.", min=1)] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV with the columns file and class_index, for accuracies.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="Images to show in the report.", min=0)] = 24,
    video: Annotated[
        bool,
        typer.Option("--video", help="The files are clips: videos, animated pictures or folders of frames; no report."),
    ] = False,
    frames: Annotated[int, typer.Option(help="Of each clip, from its beginning.", min=2)] = 32,
    tolerance: Annotated[
        str, typer.Option(help="Mean change of a patch's pixels, 0 to 255, up to which a clip does not read it again.")
    ] = "1,2,4",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Run a model uniform and adaptive side by side on your photos, and write a report.

    Example: `aptvit compare holiday/ --model vit_base_patch16_384 --keep 0.5 --out report`; for a clip
    `aptvit compare street.mp4 --video`
    """
    import torch

    from aptvit.calibration.calibrator import Target
    from aptvit.compare.comparison import compare as run
    from aptvit.files.batches import read_images
    from aptvit.files.images import find_images
    from aptvit.hosts.pretrained import load_host
    from aptvit.report.page import summary_table, write_report

    console = Console(stderr=as_json)
    device = checked_device(device)
    wish = as_wish(thresholds, keep, per_image, scales, default_scales=2)
    if config is not None:
        if wish != Target():
            raise ValueError(f"--config {config} says what is merged: leave out --thresholds, --keep and the like")
        wish, img_size = read_wish(config, model, img_size)
    if video:
        if labels is not None or config is not None:
            raise ValueError("--video takes neither --labels nor --config: thresholds are found on its frames")
        _compare_clips(
            photos,
            load_host(model, checkpoint, img_size),
            wish,
            scorer,
            getattr(torch, dtype),
            device,
            frames,
            tolerance,
            rounds,
            as_json,
        )
        return
    check_writable(out)
    files = find_images(photos)
    with Bars(Console(stderr=True)) as bars:
        host = load_host(model, checkpoint, img_size)
        if host.weights == "random":
            console.print("The hub gave no weights: they are random, so speed is real and agreement is not shown.")
        read = read_images(files, host.data, bars)
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
            labels=None if labels is None else read_labels(labels, read.paths),
            num_pictures=pictures,
            command=shlex.join(["aptvit", *sys.argv[1:]]),
            progress=bars,
        )
    page = write_report(result, out)
    for message in result.skipped:
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({**result.to_dict(), "report": str(page)}, indent=2))
    else:
        console.print(summary_table(result))
        console.print(f"Report: {page}", soft_wrap=True)


def _compare_clips(
    paths: list[Path],
    host: Host,
    wish: Target,
    scorer: str,
    dtype: torch.dtype,
    device: str,
    frames: int,
    tolerance: str,
    rounds: int | None,
    as_json: bool,
) -> None:
    """A table for each clip: reuse between frames beside the same frames one by one."""
    import aptvit
    from aptvit.compare.clips import compare_clips
    from aptvit.files.clips import read_clip
    from aptvit.files.images import ImageError
    from aptvit.hosts.pretrained import evaluation_transform
    from aptvit.measuring.memory import keep_freed_memory

    if scorer == "glance":
        raise ValueError("--scorer glance is not taught on clips: heal a model on photos of yours, or use entropy")
    keep_freed_memory()
    tolerances = as_list("tolerance", tolerance, float)
    clips, problems = {}, []
    for path in paths:
        try:
            clips[str(path)] = read_clip(path, evaluation_transform(host.data), frames).to(device)
        except ImageError as error:
            problems.append(str(error))
    for problem in problems:
        Console(stderr=True).print(f"skipped: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not clips:
        raise ValueError(f"none of {len(paths)} clips can be read; the first: {problems[0]}")
    uniform = host.model.to(device, dtype)
    model = aptvit.adapt(uniform, scorer=scorer, **wish.options()).eval()
    told = []
    for name, clip in clips.items():
        if wish.calibrated:
            aptvit.calibrate(model, clip, keep=wish.keep)
        rows = compare_clips(uniform, model, [clip], tolerances, rounds or 3)
        told += [{"clip": name, "frames": len(clip), **row.to_dict()} for row in rows]
        if not as_json:
            Console().print(_clip_table(f"{name}, {len(clip)} frames", rows))
    if as_json:
        print(json.dumps(told, indent=2))


def _clip_table(title: str, rows: list[ClipRow]) -> Table:
    caption = f"{rows[0].tokens_alone:.0%} of the tokens frame by frame; answers and speed-ups are beside that"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for heading in ("tolerance", "tokens", "same answer", "divergence", "speed-up", "beside uniform"):
        table.add_column(heading, justify="right")
    for row in rows:
        faster = f"{row.speedup.median:.2f} ({row.speedup.least:.2f} to {row.speedup.most:.2f})"
        words = (f"{row.tolerance:g}", f"{row.tokens:.0%}", f"{row.agreement:.1%}", f"{row.divergence:.4f}", faster)
        table.add_row(*words, f"{row.speedup_uniform.median:.2f}")
    return table


def read_wish(config: Path, model: str, img_size: int | None) -> tuple[Target, int | None]:
    """What `aptvit calibrate` found, and the size of the pictures that it found it for."""
    from aptvit.calibration.calibrator import Target
    from aptvit.models.checkpoints import read_config

    options = read_config(config)
    written = json.loads(config.read_text(encoding="utf-8"))
    if written["architecture"] != model:
        raise ValueError(f"{config} is for another model: give --model {written['architecture']}")
    return Target(config=options), img_size or written.get("size")


def read_labels(file: Path, photos: list[Path]) -> list[int]:
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
