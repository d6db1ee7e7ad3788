"""The demo page under many visitors: none sees another's results, the queue is bounded, nothing remains.

`python -m tests.trials.load.page --visitors 50 --minutes 5` runs it by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aptvit.demo.demo_model import DemoModel, Settings

from ...demo.visitor import Busy, Visitor, png
from ..results import Outcome, Result
from .memory import Memory
from .models import save_model

__all__ = ["trial", "visit_page"]

VISITORS = 50
KEEPS = (0.3, 0.5, 0.7, 0.9)
MAX_GROWTH = 0.05


def make_photo(number: int) -> bytes:
    """A photo of noise with a smooth part; photos of other numbers have other patches."""
    pixels = np.random.default_rng(number).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    pixels[: 8 * (number % 12)] = number % 256
    return png(pixels)


def visit_page(visitors: int, deadline: float, seed: int) -> list[Result]:
    """Let visitors upload, view and predict until the deadline; then stop the page and look at what remains."""
    with tempfile.TemporaryDirectory() as place:
        folder, temporary = save_model(Path(place, "model")), Path(place, "temporary")
        temporary.mkdir()
        expected = _expected(folder, visitors, Path(place, "photo.png"))
        command = [sys.executable, "-m", "aptvit", "demo", "--model", str(folder), "--no-browser", "--json"]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        counts, seconds, memory = Counter[str](), list[float](), Memory(process.pid)

        def visit(number: int) -> None:
            visitor = Visitor(address)
            rng = np.random.default_rng((seed, number))
            while time.monotonic() < deadline:
                photo, keep = int(rng.integers(visitors)), float(rng.choice(KEEPS))
                start = time.monotonic()
                try:
                    visitor.read(visitor.upload(make_photo(photo), f"{photo}.png"))
                    tokens, _ = visitor.view(keep)
                    shares = visitor.predict(keep).get("Adaptive")
                    counts["right" if (tokens, shares) == expected[photo, keep] else "mixed"] += 1
                    seconds.append(time.monotonic() - start)
                except Busy:
                    counts["busy"] += 1
                    time.sleep(1)
                except Exception as error:
                    counts[f"failed: {error!r:.200}"] += 1
                    visitor = Visitor(address)

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(visitors)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.sample()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        left = [path.name for path in temporary.rglob("*") if path.suffix == ".png"]
        return _results(f"{visitors} visitors, seed {seed}", counts, seconds, memory, status, left)


def _expected(folder: Path, visitors: int, file: Path) -> dict[tuple[int, float], Any]:
    """Tokens and percents of the classes, of each photo and share, by the model itself."""
    model, answers = DemoModel(str(folder)), dict[tuple[int, float], Any]()
    initial = model.settings()
    for number in range(visitors):
        file.write_bytes(make_photo(number))
        image = model.read(file)
        for keep in KEEPS:
            settings = Settings(initial.scorer, initial.scales, keep, initial.thresholds)
            top = model.predict(image, settings).top or []
            answers[number, keep] = (model.view(image, settings).tokens, [round(100 * share) for _, share in top])
    return answers


def _results(
    name: str, counts: Counter[str], seconds: list[float], memory: Memory, status: int, left: list[str]
) -> list[Result]:
    failed = sum(count for kind, count in counts.items() if kind.startswith("failed"))
    median, late = np.percentile(seconds or [0.0], [50, 95])
    detail = f"{dict(counts)}; p50 {median:.2f} s, p95 {late:.2f} s"
    growth = memory.growth(0.3) if len(memory.samples) >= 40 else 0.0
    return [
        Result(f"{name}: answers", Outcome.WRONG if counts["mixed"] else Outcome.RIGHT, detail),
        Result(f"{name}: visits", Outcome.LOST if failed or not counts["right"] else Outcome.RIGHT, detail),
        Result(
            f"{name}: memory",
            Outcome.RIGHT if growth < MAX_GROWTH else Outcome.CRASHED,
            f"{max(memory.samples) / 1e6:.0f} MB, growth {growth:+.1%}",
        ),
        Result(f"{name}: end", Outcome.RIGHT if status == 143 and not left else Outcome.LOST, f"{status}, {left[:5]}"),
    ]


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """Fifty visitors, for five minutes at most."""
    yield from visit_page(VISITORS, min(deadline, time.monotonic() + 300), seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.trials.load.page")
    parser.add_argument("--visitors", type=int, default=VISITORS)
    parser.add_argument("--minutes", type=float, default=5.0)
    options = parser.parse_args()
    for result in visit_page(options.visitors, time.monotonic() + 60 * options.minutes, 0):
        print(result)
