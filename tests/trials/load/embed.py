"""`aptvit embed` of many small images: every row once, flat memory, no slower at the end than at the beginning.

`python -m tests.trials.load.embed --images 100000` runs it by itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..results import Outcome, Result
from .memory import Memory
from .models import save_model

__all__ = ["embed_many", "trial"]

PART = 500
MAX_GROWTH = 0.05
IMAGES_PER_SECOND = 40  # at least, on two cores; decides how many fit into the time
SETTLED = 10_000  # rows after which memory may not grow; a tenth of the images if they are fewer


def make_images(folder: Path, count: int, seed: int) -> None:
    """Write images of 64 to 128 pixels, a thousand to a folder, some of them smooth."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = rng.integers(64, 129, 2)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        pixels[: height * (number % 4) // 4] = number % 256
        path = folder / f"{number // 1000:04}" / f"{number:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=80)


def embed_many(count: int, seed: int) -> list[Result]:
    """Embed `count` images made with a seed, and check rows, memory and speed."""
    import pyarrow.parquet

    name = f"embed {count} images, seed {seed}"
    with tempfile.TemporaryDirectory() as place:
        images, out = Path(place, "images"), Path(place, "out")
        make_images(images, count, seed)
        command = [sys.executable, "-m", "aptvit", "embed", images, "--model", save_model(Path(place, "model"))]
        command += ["--out", out, "--part-size", str(PART), "--threads", "2"]
        log = Path(place, "log")
        with log.open("w") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
        memory, times = Memory(process.pid), list[tuple[float, int]]()
        while process.poll() is None:
            memory.sample()
            times.append((time.monotonic(), len(list(out.rglob("*.parquet")))))
            time.sleep(0.5)
        if process.returncode:
            return [Result(name, Outcome.CRASHED, log.read_text()[-2000:])]
        rows: list[str] = []
        for part in out.rglob("*.parquet"):
            rows += pyarrow.parquet.read_table(part, columns=["file"])["file"].to_pylist()
        running = [(moment, parts) for moment, parts in times if parts]
        first = len(times) - len(running)
        start = (first + len(running) * max(min(SETTLED / count, 0.5), 0.1)) / max(len(times), 1)
        growth, slowdown = memory.growth(min(start, 0.9)), _slowdown(running)
        detail = f"memory {max(memory.samples) / 1e6:.0f} MB, growth {growth:+.1%}; time per image {slowdown:+.0%}"
        complete = len(rows) == len(set(rows)) == count
        return [
            Result(f"{name}: rows", Outcome.RIGHT if complete else Outcome.LOST, f"{len(rows)} of {count} rows"),
            Result(f"{name}: memory", Outcome.RIGHT if growth < MAX_GROWTH else Outcome.CRASHED, detail),
            Result(f"{name}: time", Outcome.RIGHT if slowdown < 0.5 else Outcome.HUNG, detail),
        ]


def _slowdown(running: list[tuple[float, int]]) -> float:
    """Time of the last half of the parts over that of the first half, minus 1; 0 if there are too few to tell."""
    if len(running) < 4 or running[-1][1] < 6:
        return 0.0
    half = running[-1][1] / 2
    middle = next(moment for moment, parts in running if parts >= half)
    return (running[-1][0] - middle) / max(middle - running[0][0], 1e-6) - 1


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """Embed as many images as the time allows, 100,000 at most."""
    seconds = max(deadline - time.monotonic() - 20, 0)
    yield from embed_many(int(min(max(seconds * IMAGES_PER_SECOND, 200), 100_000)), seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.trials.load.embed")
    parser.add_argument("--images", type=int, default=100_000)
    for result in embed_many(parser.parse_args().images, 0):
        print(result)
