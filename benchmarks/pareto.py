"""Accuracy against measured time, for adaptive patches and every baseline, on a real checkpoint and real photos.

    python benchmarks/pareto.py                                    # 500 photos at 224 and 384 px: an hour or two
    python benchmarks/pareto.py --report                           # 500 others, on which nothing was chosen
    python benchmarks/pareto.py --max-photos 40 --timed-photos 16 --rounds 2 --fit-steps 5 --sizes 224 --out /tmp/try

Writes accuracy-DEVICE.{json,md,svg}, or accuracy-test-DEVICE and a line in reports.md. An interrupted run continues
where it stopped. Checkpoint and photos are those of benchmarks/data.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from reports import LOG, note_report
from rich.console import Console
from rich.progress import track

from aptvit.evaluation.methods import DEFAULT_METHODS, Conditions, parse_methods
from aptvit.evaluation.record import EvaluationRow
from aptvit.evaluation.report import as_tables, write_results
from aptvit.evaluation.run import run_evaluation
from aptvit.files.images import find_images
from aptvit.hosts.pretrained import load_host

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
MODEL = "vit_tiny_patch16_224"
CHECKPOINT = DATA / "vit_tiny" / "vit_tiny_patch16_224.safetensors"
PHOTOS, REPORTED = DATA / "imagenet_sample", DATA / "imagenet_sample_test"
# Photos that methods are fitted and calibrated on: none of those that are measured.
OTHERS = (DATA / "coco_val64" / "images", DATA / "imagenette" / "train")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="the photos that nothing was chosen on")
    parser.add_argument("--methods", default=",".join((*DEFAULT_METHODS, "resize", "dtem")))
    parser.add_argument("--keep", default="0.83,0.67,0.51", help="shares of the tokens")
    parser.add_argument("--sizes", default="224,384", help="sides of the input in pixels")
    parser.add_argument("--max-photos", type=int, help="use only that many, spread evenly")
    parser.add_argument("--timed-photos", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--fit-steps", type=int, default=100, help="batches that DTEM is fitted on, once for each size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="name of the files; by default accuracy or accuracy-test, and the device")
    parser.add_argument("--fresh", action="store_true", help="measure again what the files hold already")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if not (CHECKPOINT.is_file() and PHOTOS.is_dir() and all(folder.is_dir() for folder in OTHERS)):
        print(f"skipped: no real checkpoint and photos in {DATA} (APTVIT_DATA names another folder)")
        return
    kind = "accuracy-test" if options.report else "accuracy"
    name = options.name or f"{kind}-{options.device.replace(':', '')}"
    command = shlex.join(["python", "benchmarks/pareto.py", *sys.argv[1:]])
    photos, others = (REPORTED, (PHOTOS, *OTHERS)) if options.report else (PHOTOS, OTHERS)
    if options.report:
        note_report(photos.name, command, options.out / LOG.name)
    record = run_evaluation(
        photos,
        partial(load_host, MODEL, CHECKPOINT),
        MODEL,
        parse_methods(options.methods.split(","), [float(share) for share in options.keep.split(",")]),
        options.out / f"{name}.json",
        sizes=[int(size) for size in options.sizes.split(",")],
        conditions=Conditions(
            dtype=getattr(torch, options.dtype),
            device=options.device,
            batch_size=options.batch_size,
            timed_images=options.timed_photos,
            rounds=options.rounds,
            max_images=options.max_photos,
            fit_steps=options.fit_steps,
            calibration=tuple(find_images(others)),
        ),
        command=command,
        fresh=options.fresh,
        progress=lambda steps, what, total: track(steps, what, total) if what == "measuring" else steps,
        done=print_row,
    )
    Console(width=160).print(as_tables(record))
    print(*write_results(record, options.out, name))


def print_row(row: EvaluationRow) -> None:
    found = row.error or f"{row.setting}, {row.tokens:.1%} of the tokens, {row.time.median:.3f} of the time"
    print(f"{row.size} px, {row.method}: {found}", file=sys.stderr)


if __name__ == "__main__":
    main()
