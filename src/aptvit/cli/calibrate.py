"""`aptvit calibrate`: thresholds, and the size of the images, from a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import (
    MODEL,
    AsJson,
    Bars,
    Checkpoint,
    Device,
    Images,
    ImgSize,
    Keep,
    Model,
    Out,
    Scales,
    Scorer,
    check_file,
    check_writable,
    checked_device,
    finish,
    print_json,
    print_line,
)

if TYPE_CHECKING:
    from aptvit.calibration.tuning import TuningResult


def calibrate(
    images: Images,
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    img_size: ImgSize = None,
    keep: Keep = None,
    speedup: Annotated[
        float | None,
        typer.Option(help="Target instead of --keep: times as fast on this machine, measured in batches of 8."),
    ] = None,
    gflops: Annotated[
        float | None,
        typer.Option(
            help="Target instead of --keep: billions of operations of an average image, two per multiply-add."
        ),
    ] = None,
    resolution: Annotated[
        Literal["auto"] | None,
        typer.Option(help="auto: find the size of the images too, by agreement with the full model at equal cost."),
    ] = None,
    scales: Scales = None,
    scorer: Scorer = "entropy",
    blend: Annotated[
        float | None, typer.Option(help="0: busy images keep more. 1: all keep the same fraction. Or between.")
    ] = None,
    min_keep: Annotated[float, typer.Option(help="Fraction of its patch tokens that no image falls below.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that no image exceeds.", min=1)] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens that no batch exceeds.", min=1)] = None,
    validate_every: Annotated[
        int, typer.Option(help="Every n-th image is kept for validation of the thresholds; 0 for none.", min=0)
    ] = 5,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find the thresholds that give your images the cost you ask for, in one pass.

    Writes config.json into a new folder. With --out FILE.json it writes that file, with --out FOLDER the whole model.

    Example: `aptvit calibrate holiday/ --model vit_base_patch16_384 --keep 0.5 --out config.json`; then
    `aptvit.adapt(vit, **aptvit.read_config("config.json"))`
    """
    from aptvit.files.images import find_images

    targets = {"keep": keep, "speedup": speedup, "gflops": gflops}
    target = {name: value for name, value in targets.items() if value is not None} or {"keep": 0.5}
    if len(target) > 1:
        raise ValueError(f"--{' and --'.join(target)}: give one of them")
    path = out or Path("calibrate") / "config.json"
    is_file = path.suffix == ".json"
    if is_file and scorer == "glance":
        raise ValueError(f"--scorer glance learns weights, which {path} cannot hold: give --out a folder")
    check_file("checkpoint", checkpoint)
    files = find_images(images)
    check_writable(path.parent if is_file else path)

    from aptvit.calibration.tuning import calibrate_files, choose_resolution, write_config
    from aptvit.hosts.pretrained import load_host

    place = checked_device(device)
    options: dict[str, Any] = {"scorer": scorer, "scales": scales or 2, "min_keep": min_keep, "max_tokens": max_tokens}
    options |= {"blend": blend, "max_batch_tokens": max_batch_tokens}
    with Bars() as bars:
        host = load_host(model, checkpoint, img_size)
        if resolution == "auto":
            tuned = choose_resolution(host, files, target, options, device=place, progress=bars)
        else:
            tuned = calibrate_files(host, files, target, options, hold_back=validate_every, device=place, progress=bars)
    if is_file:
        write_config(tuned, model, path)
    else:
        tuned.model.save_pretrained(path)
    if as_json:
        print_json({**tuned.to_dict(), "file": str(path)})
    else:
        if tuned.candidates:
            Console().print(_table(tuned))
        for line in _summary(tuned, path):
            print_line(line)
    finish(tuned.skipped)


def _summary(tuned: TuningResult, out: Path) -> list[str]:
    found = tuned.calibration
    ((name, wanted),) = found.target.items()
    thresholds = ", ".join(f"{t:.4g}" for t in found.thresholds)
    lines = [
        f"Thresholds {thresholds} at {tuned.size} pixels: {name} {found.reached[name]:.4g} (target {wanted:.4g}), "
        f"{found.keep_ratio:.1%} of the patch tokens on {found.num_images} images.",
    ]
    if found.held_back is not None:
        held = found.held_back
        lines.append(
            f"Found on the others, they give {held.num_images} images kept for validation {held.keep_ratio:.1%} "
            f"({held.error:+.1%} off the target); half of these keep {held.share_quantiles[2]:.0%} to "
            f"{held.share_quantiles[4]:.0%}, all {held.share_quantiles[0]:.0%} to {held.share_quantiles[-1]:.0%}."
        )
    if tuned.speedup is not None:
        speedup = tuned.speedup
        lines.append(
            f"Measured on the first images: {speedup.median:.2f} times as fast "
            f"(rounds {speedup.least:.2f} to {speedup.most:.2f})."
        )
    return [*lines, f"Written: {out}"]


def _table(tuned: TuningResult) -> Table:
    table = Table(title="Sizes at equal operations")
    for heading in ("pixels", "tokens kept", "same answer as the full model", "divergence (nats)", ""):
        table.add_column(heading, justify="right")
    for candidate in tuned.candidates:
        chosen = "chosen" if candidate.size == tuned.size else ""
        kept = f"{candidate.calibration.keep_ratio:.0%}"
        agreement, divergence = f"{candidate.agreement:.1%}", f"{candidate.divergence:.3f}"
        table.add_row(str(candidate.size), kept, agreement, divergence, chosen)
    return table
