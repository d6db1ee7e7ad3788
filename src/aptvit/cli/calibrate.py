"""`aptvit calibrate`: find thresholds for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aptvit.cli.checks import check_file, check_saved, check_writable, checked_device, find_readable, is_saved
from aptvit.cli.options import (
    MODEL,
    CheckpointOption,
    DeviceOption,
    GflopsOption,
    ImagesArgument,
    ImgSizeOption,
    JsonOption,
    KeepOption,
    ModelOption,
    OutOption,
    ScalesOption,
    ScorerOption,
)
from aptvit.cli.output import ProgressBars, finish, print_json, print_line

if TYPE_CHECKING:
    from aptvit.calibration.files import FilesCalibration


def calibrate(
    images: ImagesArgument,
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    keep: KeepOption = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Target instead of --keep: speed-up over the uniform model on this machine, measured in batches of 8."
        ),
    ] = None,
    gflops: GflopsOption = None,
    scales: ScalesOption = None,
    scorer: ScorerOption = "entropy",
    blend: Annotated[
        float | None,
        typer.Option(
            help="0: detailed images keep more tokens. 1: all images keep the same share. Or a value between."
        ),
    ] = None,
    min_keep: Annotated[float, typer.Option(help="Smallest share of the patch tokens that an image keeps.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Largest number of tokens of an image.", min=1)] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Largest number of tokens of a batch.", min=1)] = None,
    validate_every: Annotated[
        int, typer.Option(help="Hold back every n-th image to validate the thresholds; 0 for none.", min=0)
    ] = 5,
    device: DeviceOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the thresholds at which your images have the target cost, in one pass over the images.

    Writes config.json into a new folder; with --out FILE.json writes that file, with --out FOLDER the whole model.

    Example: `aptvit calibrate holiday/ --model vit_base_patch16_384 --keep 0.5 --out config.json`; then
    `aptvit.adapt(vit, **aptvit.read_config("config.json"))`
    """
    targets = {"keep": keep, "speedup": speedup, "gflops": gflops}
    target = {name: value for name, value in targets.items() if value is not None} or {"keep": 0.5}
    if len(target) > 1:
        raise ValueError(f"--{' and --'.join(target)}: give only one target")
    path = out or Path("calibrate") / "config.json"
    is_file = path.suffix == ".json"
    if is_file and scorer == "glance":
        raise ValueError(f"--scorer glance has trained weights, which {path} cannot hold: give --out a folder")
    if is_saved(model):
        changed: dict[str, Any] = {
            "scales": scales,
            "blend": blend,
            "max-tokens": max_tokens,
            "max-batch-tokens": max_batch_tokens,
        }
        changed |= {"min-keep": min_keep or None}
        check_saved(model, {**changed, "scorer": None if scorer == "entropy" else scorer})
    if is_file and (is_saved(model) or "/" in model or Path(model).is_dir()):
        raise ValueError(f"{model} has weights of its own, which {path} cannot hold: give --out a folder")
    check_file("checkpoint", checkpoint)
    files = find_readable(images)
    check_writable(path.parent if is_file else path)

    from aptvit.api import load_any
    from aptvit.calibration.files import calibrate_files, write_config

    device = checked_device(device)
    options: dict[str, Any] = {"scorer": scorer, "scales": scales or 2, "min_keep": min_keep, "max_tokens": max_tokens}
    options |= {"blend": blend, "max_batch_tokens": max_batch_tokens}
    with ProgressBars() as bars:
        host = load_any(model, checkpoint, img_size)
        chosen = calibrate_files(host, files, target, options, hold_back=validate_every, device=device, progress=bars)
    if is_file:
        write_config(chosen, model, path)
    else:
        chosen.model.save_pretrained(path)
        if host.library == "transformers":
            from aptvit.hosts.transformers_models import save_processor

            save_processor(host.model, path)
    if as_json:
        print_json({**chosen.to_dict(), "file": str(path)})
    else:
        for line in _summary(chosen, path):
            print_line(line)
    finish(chosen.skipped)


def _summary(chosen: FilesCalibration, out: Path) -> list[str]:
    result = chosen.calibration
    ((name, target),) = result.target.items()
    thresholds = ", ".join(f"{t:.4g}" for t in result.thresholds)
    lines = [
        f"Thresholds {thresholds} at {chosen.size} pixels: {name} {result.reached[name]:.4g} (target {target:.4g}), "
        f"{result.keep_ratio:.1%} of the patch tokens on {result.num_images} images.",
    ]
    if result.held_back is not None:
        held = result.held_back
        lines.append(
            f"Validation ({held.num_images} held back, thresholds of the others): {held.keep_ratio:.1%} of the patch "
            f"tokens ({held.error:+.1%} off the target), {held.share_quantiles[0]:.0%} to "
            f"{held.share_quantiles[-1]:.0%}, the middle half {held.share_quantiles[2]:.0%} to "
            f"{held.share_quantiles[4]:.0%}."
        )
    if chosen.speedup is not None:
        speedup = chosen.speedup
        lines.append(
            f"Measured on the first images: {speedup.median:.2f} times as fast "
            f"(rounds {speedup.least:.2f} to {speedup.most:.2f})."
        )
    return [*lines, f"Written: {out}"]
