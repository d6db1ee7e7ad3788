"""The paper's figure 7 (accuracy and speed over thresholds) and Table 7b (how new weights start) on a real checkpoint.

    python benchmarks/ablations.py      # about ten minutes; an interrupted run goes on

DATA holds vit_tiny/ (a checkpoint of vit_tiny_patch16_224) and imagenet_sample/ (photos and labels.csv). Writes
benchmarks/results/ablations.{json,md} and ablations-thresholds.svg.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import aptvit
from aptvit.calibration.calibrator import Wish, calibrate
from aptvit.compare.comparison import compare
from aptvit.files.images import find_images
from aptvit.files.photos import NormalisedBatches, Photos, read_photos
from aptvit.hosts.pretrained import load_host
from aptvit.measuring.records import write_json
from aptvit.measuring.timing import describe_device, describe_environment

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
RESULTS = Path(__file__).parent / "results"
MODEL = "vit_tiny_patch16_224"
THRESHOLDS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5)
INIT_SIZE = 224
INITS = ("zero", "residual", "nonzero")


@dataclass(frozen=True)
class Row:
    size: int
    threshold: float
    keep_ratio: float
    top1: float
    agreement: float
    speedup: float
    speedup_least: float
    speedup_most: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--max-photos", type=int, default=250)
    parser.add_argument("--sizes", default="224", help="sides of the input in pixels")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds already")
    args = parser.parse_args()
    checkpoint, folder = args.data / "vit_tiny" / f"{MODEL}.safetensors", args.data / "imagenet_sample"
    if not (checkpoint.is_file() and folder.is_dir()):
        print(f"skipped: no real checkpoint and photos in {args.data} (--data or APTVIT_DATA names another folder)")
        return
    with (folder / "labels.csv").open(newline="") as lines:
        classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(lines)}
    files = find_images([folder])[: args.max_photos]
    record = _before(len(files), args.fresh)
    for size in map(int, args.sizes.split(",")):
        host = load_host(MODEL, checkpoint, size)
        photos = read_photos(files, host.data)
        labels = [classes[path.name] for path in photos.paths]
        for threshold in THRESHOLDS:
            if any((row["size"], row["threshold"]) == (size, threshold) for row in record["thresholds"]):
                continue
            wish = Wish(thresholds=(threshold,))
            options: dict[str, Any] = {"labels": labels, "num_pictures": 0, "batch_size": 16, "rounds": 2}
            found = compare(load_host(MODEL, checkpoint, size), MODEL, photos, wish, **options)
            assert found.top1_adaptive is not None and found.agreement is not None
            ratios = [a / b for a, b in zip(found.seconds_uniform, found.seconds_adaptive, strict=True)]
            spread = (sum(ratios) / len(ratios), min(ratios), max(ratios))
            row = Row(size, threshold, found.keep_ratio, found.top1_adaptive, found.agreement, *spread)
            record["thresholds"].append(asdict(row))
            record["uniform_top1"][str(size)] = found.top1_uniform
            print(row, flush=True)
            _write(record)
        if size == INIT_SIZE and not record["init"]:
            record["init"] = [
                {"init": init, **_accuracy(host.model, photos, host.data, labels, init)} for init in INITS
            ]
            print(*record["init"], sep="\n", flush=True)
            _write(record)


def _before(num_photos: int, fresh: bool) -> dict[str, Any]:
    """What the file holds already, if it was measured on as many photos."""
    file = RESULTS / "ablations.json"
    where = {"device": describe_device("cpu"), "environment": describe_environment(True), "photos": num_photos}
    if file.is_file() and not fresh:
        record: dict[str, Any] = json.loads(file.read_text())
        if record["photos"] == num_photos:
            return record
    return {"thresholds": [], "uniform_top1": {}, "init": [], **where}


@torch.inference_mode()
def _accuracy(host: torch.nn.Module, photos: Photos, data: dict, labels: list[int], init: Any) -> dict[str, float]:
    """Top-1 at 67 % of the tokens, before any training; three draws of what starts at random."""
    found = []
    for seed in range(1 if init == "zero" else 3):
        torch.manual_seed(seed)
        model = aptvit.adapt(host, init=init, scales=2).eval()
        batches = NormalisedBatches(photos.pixels, data, 16, "cpu")
        calibrate(model, batches, keep=0.67)
        answers = torch.cat([model(images).argmax(1) for images in batches])
        found.append(float((answers == torch.tensor(labels)).float().mean()))
    return {"top1": sum(found) / len(found), "least": min(found), "most": max(found)}


def _write(record: dict[str, Any]) -> None:
    write_json(RESULTS / "ablations.json", record)
    rows, uniform = [Row(**row) for row in record["thresholds"]], record["uniform_top1"]
    lines = [
        "# Thresholds and new weights, ViT-Ti/16 without training",
        "",
        f"{record['photos']} photos, float32, two scales, {record['device']}: `python benchmarks/ablations.py`. "
        f"Uniform top-1: {', '.join(f'{top1:.1%} at {size} px' for size, top1 in uniform.items())}.",
        "",
        "| pixels | threshold (bits) | tokens kept | top-1 | same answer as uniform | speed-up (rounds) |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        speed = f"{r.speedup:.2f} ({r.speedup_least:.2f} to {r.speedup_most:.2f})"
        lines.append(f"| {r.size} | {r.threshold} | {r.keep_ratio:.1%} | {r.top1:.1%} | {r.agreement:.1%} | {speed} |")
    lines += [
        "",
        f"How the sub-patch branch starts, {INIT_SIZE} px, 67 % of the tokens (mean and range of three draws):",
        "",
        "| start | top-1 |",
        "|---|---|",
        *(f"| {one['init']} | {one['top1']:.1%} ({one['least']:.1%} to {one['most']:.1%}) |" for one in record["init"]),
    ]
    (RESULTS / "ablations.md").write_text("\n".join(lines) + "\n")
    _plot(rows, uniform)


def _plot(rows: list[Row], uniform: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "aptvit", "font.size": 9})
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
    sizes = sorted({row.size for row in rows})
    for size, colour in zip(sizes, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=False):
        mine = [row for row in rows if row.size == size]
        taus = [row.threshold for row in mine]
        panels[0].plot(taus, [100 * row.top1 for row in mine], "o-", color=colour, label=f"{size} px")
        panels[0].axhline(100 * uniform[str(size)], color=colour, linestyle=":", linewidth=1)
        low, high = [row.speedup - row.speedup_least for row in mine], [row.speedup_most - row.speedup for row in mine]
        panels[1].errorbar(taus, [row.speedup for row in mine], (low, high), fmt="o-", color=colour, label=f"{size} px")
        for row in mine:
            at = (row.threshold, row.speedup)
            panels[1].annotate(f"{row.keep_ratio:.0%}", at, (0, 6), textcoords="offset points", ha="center", size=7)
    panels[0].set(xlabel="threshold (bits)", ylabel="top-1 (%), dotted: uniform", title="Accuracy without training")
    panels[1].set(xlabel="threshold (bits)", ylabel="times as fast as uniform", title="Speed-up, with tokens kept")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(RESULTS / "ablations-thresholds.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
