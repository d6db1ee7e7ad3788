"""A 12-megapixel image segmented on a CPU: time and peak memory, reduced and in tiles.

    python benchmarks/large_images.py
    python benchmarks/large_images.py --sizes max_side=1440 tile=1024 whole

The segmenter is a ViT-Ti/16 with UperNet's head (`aptvit.dense.make_segmenter`), 19 classes, half of the patch tokens,
and random weights: time does not depend on them. The image is a mosaic of the photos of scikit-image and scikit-learn
at 4000 x 3000 pixels. Each size is a process of its own, from the image in memory to the class of each of its pixels;
CPU seconds are those of all threads, which other work on the machine lengthens least. The memory is the peak of the
process beyond what it held with the network and the image in memory.

Writes large-images.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
WIDTH, HEIGHT = 4000, 3000
INFERENCE = {"slide": False, "crop": 512, "longer_side": 0}  # what the recipe of segmenters sets
HEADINGS = ("size", "read at", "tiles", "seconds", "CPU seconds", "memory, GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["max_side=1024", "max_side=1440"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    rows = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--only", size]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    write(rows)


def measure(size: str) -> dict[str, Any]:
    """Segment the mosaic in this process."""
    import timm
    import torch

    import aptvit
    from aptvit.dense import make_segmenter
    from aptvit.dense.inference import predict_image
    from aptvit.dense.saved import DenseModel

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_384", dynamic_img_size=True)
    segmenter = make_segmenter(aptvit.adapt(vit, keep=0.5), 19).eval()
    dense = DenseModel(segmenter, "segmentation", tuple("abcdefghijklmnopqrs"), INFERENCE)
    name, _, side = size.partition("=")
    image, before = mosaic(), peak_gigabytes()
    start, used = time.perf_counter(), time.process_time()
    prediction = predict_image(dense, image, **({name: int(side)} if side else {}))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    assert prediction.classes is not None and prediction.classes.shape == (HEIGHT, WIDTH)
    height, width = prediction.read_size
    return {
        "size": size,
        "read at": f"{width} x {height}",
        "tiles": prediction.num_tiles,
        "seconds": round(seconds, 1),
        "CPU seconds": round(used, 1),
        "memory, GB": round(peak_gigabytes() - before, 2),
    }


def mosaic() -> Any:
    """Photos side by side, each at its own size, over the whole image."""
    from PIL import Image

    from aptvit.files.sample_photos import sample_photos

    photos = [photo for photo in sample_photos().values() if min(photo.shape[:2]) >= 400]
    canvas = Image.new("RGB", (WIDTH, HEIGHT))
    tiles = [(left, top) for top in range(0, HEIGHT, 400) for left in range(0, WIDTH, 400)]
    for i, corner in enumerate(tiles):
        canvas.paste(Image.fromarray(np.ascontiguousarray(photos[i % len(photos)][:400, :400])), corner)
    return canvas


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write(rows: list[dict[str, Any]]) -> None:
    """Write large-images.json and large-images.md."""
    from aptvit.measuring.machine import prepare_machine
    from aptvit.storage.writing import write_json

    facts = prepare_machine("cpu")
    del facts["allocator"]  # of this process, not of those that measured
    record = {
        "command": shlex.join(["python", "benchmarks/large_images.py", *sys.argv[1:]]),
        "environment": facts,
        "rows": rows,
    }
    write_json(RESULTS / "large-images.json", record, indent=1)
    (RESULTS / "large-images.md").write_text(as_markdown(record))


def as_markdown(record: dict[str, Any]) -> str:
    """The page of a record."""
    from aptvit.measuring.tables import markdown_page, markdown_table

    columns = [(heading, partial(_cell, heading)) for heading in HEADINGS]
    title = f"An image of {WIDTH} x {HEIGHT} pixels, segmented"
    table = markdown_table(columns, record["rows"])
    return markdown_page(title, [record["command"]], record["environment"], table)


def _cell(heading: str, row: dict[str, Any]) -> str:
    return str(row[heading])


if __name__ == "__main__":
    main()
