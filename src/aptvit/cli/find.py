"""`aptvit detect` and `aptvit segment`: what a trained model finds in photos, with the patches beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aptvit.cli.options import AsJson, Bars, Paths, check_writable, checked_device

Model = Annotated[Path, typer.Option(help="The folder of a finished training, or model/ inside it.")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures.")]
Device = Annotated[str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.")]


def detect(
    photos: Paths,
    model: Model,
    min_score: Annotated[float, typer.Option(help="Leave out boxes below this score.", min=0, max=1)] = 0.5,
    out: Out = Path("found"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find objects in photos; writes each with its boxes, the patches beside.

    Example: `aptvit detect holiday/ --model detector`
    """
    _find("detection", photos, model, min_score, out, checked_device(device), as_json)


def segment(
    photos: Paths,
    model: Model,
    out: Out = Path("found"),
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the class of each pixel of photos; writes each with its classes, the patches beside, and a mask.

    Example: `aptvit segment street.jpg --model segmenter`
    """
    _find("segmentation", photos, model, 0.0, out, checked_device(device), as_json)


def _find(task: str, paths: list[Path], folder: Path, min_score: float, out: Path, device: str, as_json: bool) -> None:
    from aptvit.dense.inference import predict_image
    from aptvit.dense.saved import from_pretrained
    from aptvit.files.images import ImageError, find_images, open_image
    from aptvit.report.drawing import save_png
    from aptvit.report.found import draw_found

    files = find_images(paths)
    check_writable(out)
    dense = from_pretrained(folder)
    if dense.task != task:
        raise ValueError(f"{folder} does {dense.task}: use aptvit {'detect' if task == 'segmentation' else 'segment'}")
    dense.network.to(device)
    errors = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    with Bars(errors) as bars:
        for file in bars(files, "photos", len(files)):
            try:
                photo = open_image(file)
            except ImageError as error:
                errors.print(f"skipped: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
                continue
            found = predict_image(dense, photo, min_score)
            row: dict[str, Any] = {"file": str(file)}
            row |= {name: getattr(found, name) for name in ("tokens", "tokens_read", "uniform_tokens")}
            drawn = draw_found(photo, found, dense.classes)
            row["picture"] = str(save_png(drawn, _free(out / f"{file.stem}.png", rows)))
            if found.classes is None:
                row["boxes"] = [
                    {"class": dense.classes[label], "score": round(float(score), 4), "box": box.round(1).tolist()}
                    for box, label, score in zip(found.boxes, found.labels, found.scores, strict=True)
                ]
            else:
                from PIL import Image

                mask = Image.fromarray(found.classes.astype("uint8" if len(dense.classes) <= 256 else "uint16"))
                row["mask"] = str(save_png(mask, Path(row["picture"]).with_suffix(".mask.png")))
            rows.append(row)
    if not rows:
        raise ValueError("none of these photos could be read")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    console = Console()
    for row in rows:
        told = f"{row['file']}: {row['tokens']} of {row['uniform_tokens']} tokens"
        if row["tokens_read"] > row["tokens"]:
            told += f" ({row['tokens_read']} read in two passes)"
        if "boxes" in row:
            told += f", {len(row['boxes'])} objects"
        console.print(f"{told}, {row['picture']}", soft_wrap=True, markup=False, highlight=False)


def _free(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Another name where two photos share one."""
    taken, number, free = {row["picture"] for row in rows}, 1, path
    while str(free) in taken:
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
