"""The paper's figure 7 (accuracy and speed over thresholds) and Table 7b (how new weights start) on a real checkpoint.

    python benchmarks/ablations.py      # about ten minutes; an interrupted run goes on

DATA holds vit_tiny/ (a checkpoint of vit_tiny_patch16_224) and imagenet_sample/ (photos and labels.csv). Writes
benchmarks/results/ablations.{json,md} and ablations-thresholds.svg.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch

import aptvit
from aptvit.calibration.calibrator import Target, calibrate
from aptvit.compare.comparison import compare
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images
from aptvit.files.images import find_images
from aptvit.hosts.pretrained import load_host
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.plots import COLOURS, draw_ratios, make_panels, write_results
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.rounds import Ratio
from aptvit.measuring.tables import Columns, markdown_page, section

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224"
THRESHOLDS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5)
INIT_SIZE = 224
INITS = ("zero", "residual", "nonzero")


@dataclass(frozen=True)
class AblationRow(Measurement):
    """One threshold, or one way to start the sub-patch branch.

    Attributes:
        size: Side of the input in pixels.
        setting: The threshold, or the name of the start.
        top1: Of the adaptive model; of a start, mean and range of three draws.
        keep_ratio: Share of the tokens kept.
        agreement: Share of the photos with the uniform model's answer.
        speedup: Beside the uniform model.
        uniform_top1: Of the uniform model.
    """

    identity: ClassVar[tuple[str, ...]] = ("size", "setting")

    size: int
    setting: float | str
    top1: Ratio | None = None
    keep_ratio: float | None = None
    agreement: float | None = None
    speedup: Ratio | None = None
    uniform_top1: float | None = None


class AblationRecord(Record[AblationRow]):
    row_type = AblationRow
    contents = "ablations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--max-photos", type=int, default=250)
    parser.add_argument("--sizes", default="224", help="sides of the input in pixels")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds already")
    options = parser.parse_args()
    checkpoint, folder = options.data / "vit_tiny" / f"{MODEL}.safetensors", options.data / "imagenet_sample"
    if not (checkpoint.is_file() and folder.is_dir()):
        print(f"skipped: no real checkpoint and photos in {options.data} (--data or APTVIT_DATA names another folder)")
        return
    with (folder / "labels.csv").open(newline="") as lines:
        classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(lines)}
    files = find_images([folder])[: options.max_photos]
    path = options.out / "ablations.json"
    environment = {**prepare_machine("cpu"), "photos": str(len(files))}
    command = shlex.join(["python", "benchmarks/ablations.py", *sys.argv[1:]])
    record = AblationRecord.resume(path, environment, command, options.fresh)

    @cache
    def read(size: int) -> tuple[LoadedImages, list[int]]:
        photos = read_images(files, load_host(MODEL, checkpoint, size).data)
        return photos, [classes[path.name] for path in photos.paths]

    sizes = [int(size) for size in options.sizes.split(",")]
    wanted = [AblationRow(size, threshold) for size in sizes for threshold in THRESHOLDS]
    wanted += [AblationRow(INIT_SIZE, init) for init in INITS if INIT_SIZE in sizes]
    record.measure(wanted, partial(measure, checkpoint, read), path, done=print)
    write_results(record, options.out, "ablations", as_markdown, figures)


def measure(checkpoint: Path, read: Any, row: AblationRow) -> dict[str, Any]:
    """The other fields of a row."""
    host, (photos, labels) = load_host(MODEL, checkpoint, row.size), read(row.size)
    if isinstance(row.setting, str):
        return {"top1": _top1_of_start(host.model, photos, host.data, labels, row.setting)}
    wish = Target(thresholds=(row.setting,))
    found = compare(host, MODEL, photos, wish, labels=labels, num_drawings=0, batch_size=16, rounds=2)
    assert found.top1_adaptive is not None
    return {
        "keep_ratio": found.keep_ratio,
        "top1": Ratio(*[found.top1_adaptive] * 3),
        "agreement": found.agreement,
        "speedup": found.speedup,
        "uniform_top1": found.top1_uniform,
    }


@torch.inference_mode()
def _top1_of_start(host: torch.nn.Module, photos: LoadedImages, data: dict, labels: list[int], init: Any) -> Ratio:
    """Top-1 at 67 % of the tokens, before any training; three draws of what starts at random."""
    found = []
    for seed in range(1 if init == "zero" else 3):
        torch.manual_seed(seed)
        model = aptvit.adapt(host, init=init, scales=2).eval()
        batches = NormalisedBatches(photos.pixels, data, 16, "cpu")
        calibrate(model, batches, keep=0.67)
        answers = torch.cat([model(images).argmax(1) for images in batches])
        found.append(float((answers == torch.tensor(labels)).float().mean()))
    return Ratio(sum(found) / len(found), min(found), max(found))


def as_markdown(record: AblationRecord, drawn: list[str]) -> str:
    thresholds: Columns = (
        ("pixels", lambda row: str(row.size)),
        ("threshold (bits)", lambda row: str(row.setting)),
        ("tokens kept", lambda row: f"{row.keep_ratio:.1%}"),
        ("top-1", lambda row: f"{row.top1.median:.1%}"),
        ("same answer as uniform", lambda row: f"{row.agreement:.1%}"),
        ("speed-up (rounds)", lambda row: f"{row.speedup:.2f}"),
    )
    starts: Columns = (("start", lambda row: row.setting), ("top-1", lambda row: f"{row.top1:.1%}"))
    rows = _thresholds(record)
    uniform = ", ".join(
        f"{top1:.1%} at {size} px" for size, top1 in {row.size: row.uniform_top1 for row in rows}.items()
    )
    about = f"float32, two scales. Uniform top-1: {uniform}."
    start = f"How the sub-patch branch starts, {INIT_SIZE} px, 67 % of the tokens (mean and range of three draws)."
    return markdown_page(
        "Thresholds and new weights, ViT-Ti/16 without training",
        record.commands,
        record.environment,
        section("Thresholds", about, thresholds, rows),
        section("New weights", start, starts, [row for row in record.measured if isinstance(row.setting, str)]),
    )


def _thresholds(record: AblationRecord) -> list[AblationRow]:
    return [row for row in record.measured if not isinstance(row.setting, str)]


def figures(record: AblationRecord) -> dict[str, Any]:
    rows = _thresholds(record)
    figure, ((accuracy, speed),) = make_panels(1, 2, (8, 3.2))
    for size, colour in zip(sorted({row.size for row in rows}), COLOURS, strict=False):
        of_size = [row for row in rows if row.size == size]
        bits = [row.setting for row in of_size]
        accuracy.plot(bits, [100 * row.top1.median for row in of_size], "o-", color=colour, label=f"{size} px")
        accuracy.axhline(100 * of_size[0].uniform_top1, color=colour, linestyle=":")
        draw_ratios(speed, bits, [row.speedup for row in of_size], color=colour)
        for row in of_size:
            place = (row.setting, row.speedup.median)
            speed.annotate(f"{row.keep_ratio:.0%}", place, (0, 6), textcoords="offset points", ha="center", size=7)
    accuracy.set(xlabel="threshold (bits)", ylabel="top-1 (%), dotted: uniform", title="Accuracy without training")
    speed.set(xlabel="threshold (bits)", ylabel="times as fast as uniform", title="Speed-up, with tokens kept")
    accuracy.legend(frameon=False)
    return {"-thresholds": figure}


if __name__ == "__main__":
    main()
