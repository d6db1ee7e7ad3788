"""`aptvit tune`: find the best setting for a target on your images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from aptvit.cli.checks import check_file, check_writable, checked_device, find_readable, is_saved
from aptvit.cli.options import (
    MODEL,
    BatchSizeOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    FreshOption,
    GflopsOption,
    ImagesArgument,
    ImgSizeOption,
    JsonOption,
    ModelOption,
    OutOption,
    RoundsOption,
)
from aptvit.cli.output import ProgressBars, command_line, finish, print_json, print_line


def tune(
    images: ImagesArgument,
    model: ModelOption = MODEL,
    checkpoint: CheckpointOption = None,
    img_size: ImgSizeOption = None,
    time: Annotated[
        float | None, typer.Option(help="Target: time relative to the uniform model, measured on this machine.")
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            help="Target instead of --time: share of your images with the uniform model's class; for a model without "
            "classes the cosine of embeddings."
        ),
    ] = None,
    gflops: GflopsOption = None,
    max_images: Annotated[
        int | None, typer.Option(help="Use only this number of images, spread evenly.", min=1)
    ] = None,
    rounds: RoundsOption = None,
    batch_size: BatchSizeOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    out: OutOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find what saves most on your images: adaptive patches, a smaller image, ToMe, or nothing.

    Tries scorers, shares, sizes of patches and images; measures the best of each kind on a third of the images that
    the search does not see, and says which to take. Writes a folder that `aptvit.from_pretrained` and --model take. An
    interrupted search continues where it stopped.

    Example: `aptvit tune holiday/ --model vit_base_patch16_384 --time 0.6 --out tuned`
    """
    goals = {"time": time, "agreement": agreement, "gflops": gflops}
    chosen = {name: value for name, value in goals.items() if value is not None} or {"time": 0.6}
    if len(chosen) > 1:
        raise ValueError(f"--{' and --'.join(chosen)}: give only one target")
    ((kind, value),) = chosen.items()
    if is_saved(model):
        raise ValueError(f"{model} is adaptive already: give --model the uniform model")
    check_file("checkpoint", checkpoint)
    files = find_readable(images)
    folder = out or Path("tune")
    check_writable(folder)

    import torch

    from aptvit.evaluation.methods import Conditions
    from aptvit.hosts.pretrained import check_model, load_host
    from aptvit.tuning.search import Search, split_images
    from aptvit.tuning.space import Goal
    from aptvit.tuning.verdict import judge, table_of, write_tuned

    goal = Goal(kind, value)  # type: ignore[arg-type]
    check_model(model)
    paths, held_out = split_images(files, max_images or 360)
    conditions = Conditions(
        dtype=getattr(torch, dtype),
        device=checked_device(device),
        batch_size=batch_size or 8,
        timed_images=batch_size or 8,
        rounds=rounds or 7,
    )
    with ProgressBars() as bars:
        search = Search(
            lambda size: load_host(model, checkpoint, size or img_size),
            model,
            paths,
            held_out,
            goal,
            folder / "tune.json",
            conditions=conditions,
            command=command_line(),
            fresh=fresh,
            progress=bars,
        )
        result = search.run()
    verdict = judge(result)
    code = write_tuned(search, result, verdict, folder)
    if as_json:
        finalists = [trial.to_dict() for trial in result.finalists]
        print_json({"verdict": verdict.kind, "sentence": verdict.sentence, "finalists": finalists, "code": code})
        finish(result.record.skipped)
        return
    columns, rows = table_of(result)
    table = Table(title=f"On {len(held_out)} images that the search did not see, for {goal}")
    for heading, _ in columns:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    Console().print(table)
    print_line(verdict.sentence)
    print_line(f"Written: {folder}; model = aptvit.from_pretrained({str(folder)!r})")
    if code:
        print_line(f"Then: {code}")
    finish(result.record.skipped)
