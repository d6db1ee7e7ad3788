"""`aptvit calibrate`: thresholds, and the size of the pictures, from a wish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.options import AsJson, Bars, Paths, Scales, ScorerOption, check_writable, checked_device

if TYPE_CHECKING:
    from aptvit.calibration.tuning import TuningResult


def calibrate(
    photos: Paths,
    model: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_base_patch16_384",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to load instead of timm's own.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input in pixels.", min=1)] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the patch tokens to keep, 0.5 by default.")] = None,
    speedup: Annotated[
        float | None, typer.Option(help="How many times as fast on this machine, measured in batches of 8.")
    ] = None,
    gflops: Annotated[
        float | None, typer.Option(help="Billions of operations of an average image; a multiply-add is two.")
    ] = None,
    resolution: Annotated[
        Literal["auto"] | None,
        typer.Option(help="auto: find the size of the pictures too, by agreement with the full model at equal cost."),
    ] = None,
    scorer: ScorerOption = "entropy",
    scales: Scales = None,
    blend: Annotated[
        float | None, typer.Option(help="0: busy images keep more. 1: each the same share. Or between.")
    ] = None,
    min_keep: Annotated[float, typer.Option(help="Share of its patch tokens that no image falls below.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens that no image exceeds.", min=1)] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens that no batch exceeds.", min=1)] = None,
    hold_back: Annotated[
        int, typer.Option(help="Every n-th photo tells how thresholds of the others carry over.", min=0)
    ] = 5,
    device: Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")] = None,
    out: Annotated[
        Path, typer.Option(help="A .json file for the thresholds found, or a folder for the whole model.")
    ] = Path("config.json"),
    as_json: AsJson = False,
) -> None:
    """Find the thresholds that give your photos the cost you ask for, in one pass.

    Example: `aptvit calibrate holiday/ --model vit_base_patch16_384 --keep 0.5 --out config.json`; then
    `aptvit.adapt(vit, **aptvit.read_config("config.json"))`
    """
    from aptvit.calibration.tuning import calibrate_files, choose_resolution, write_config
    from aptvit.files.images import find_images
    from aptvit.hosts.pretrained import load_host

    given = {"keep": keep, "speedup": speedup, "gflops": gflops}
    wishes = {name: value for name, value in given.items() if value is not None} or {"keep": 0.5}
    if len(wishes) > 1:
        raise ValueError(f"--{' and --'.join(wishes)}: give one of them")
    is_file = out.suffix == ".json"
    if is_file and scorer == "glance":
        raise ValueError(f"--scorer glance learns weights, which {out} cannot hold: give --out a folder")
    check_writable(out.parent if is_file else out)
    device = checked_device(device)
    files = find_images(photos)
    options: dict[str, Any] = {"scorer": scorer, "scales": scales or 2, "min_keep": min_keep, "max_tokens": max_tokens}
    options |= {"blend": blend, "max_batch_tokens": max_batch_tokens}
    console = Console(stderr=as_json)
    with Bars(Console(stderr=True)) as bars:
        host = load_host(model, checkpoint, img_size)
        if resolution == "auto":
            tuned = choose_resolution(host, files, wishes, options, device=device, progress=bars)
        else:
            tuned = calibrate_files(host, files, wishes, options, hold_back=hold_back, device=device, progress=bars)
    if is_file:
        write_config(tuned, model, out)
    else:
        tuned.model.save_pretrained(out)
    for message in tuned.skipped:
        Console(stderr=True).print(f"skipped: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps({**tuned.to_dict(), "file": str(out)}, indent=2))
        return
    if tuned.candidates:
        console.print(_table(tuned))
    for line in _summary(tuned, out):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _summary(tuned: TuningResult, out: Path) -> list[str]:
    found = tuned.calibration
    ((name, wanted),) = found.target.items()
    thresholds = ", ".join(f"{t:.4g}" for t in found.thresholds)
    lines = [
        f"Thresholds {thresholds} at {tuned.size} pixels: {name} {found.reached[name]:.4g} (asked for {wanted:.4g}), "
        f"{found.keep_ratio:.1%} of the patch tokens on {found.num_images} photos.",
    ]
    if found.held_back is not None:
        held = found.held_back
        lines.append(
            f"Found on the others, they give {held.num_images} photos held back {held.keep_ratio:.1%} "
            f"({held.error:+.1%} off the wish); half of these keep {held.share_quantiles[2]:.0%} to "
            f"{held.share_quantiles[4]:.0%}, all {held.share_quantiles[0]:.0%} to {held.share_quantiles[-1]:.0%}."
        )
    if tuned.speedup is not None:
        speedup = tuned.speedup
        lines.append(
            f"Measured on the first photos: {speedup.median:.2f} times as fast "
            f"(rounds {speedup.least:.2f} to {speedup.most:.2f})."
        )
    return [*lines, f"Written: {out}"]


def _table(tuned: TuningResult) -> Table:
    table = Table(title="Sizes at equal operations")
    for heading in ("pixels", "tokens kept", "same answer as the full model", "divergence (nats)", ""):
        table.add_column(heading, justify="right")
    for one in tuned.candidates:
        chosen = "chosen" if one.size == tuned.size else ""
        kept = f"{one.calibration.keep_ratio:.0%}"
        table.add_row(str(one.size), kept, f"{one.agreement:.1%}", f"{one.divergence:.3f}", chosen)
    return table
