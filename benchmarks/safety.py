"""What it costs to write files whole, lock folders and compare what is continued: two checkouts beside each other.

    git worktree add ../before 716d8ae
    python benchmarks/safety.py ../before

`aptvit embed` and `aptvit finetune`, whole commands from images in files to results on the disk, in processes that have
imported everything: a ViT-Ti/16 at 224 px with random weights, half of the tokens. In each round both checkouts work
once, one after the other, in an order that is turned round from one round to the next. Images are cut out of photos of
scikit-image and scikit-learn.

Writes safety-cpu.{json,md}, or with --works safety-embed-cpu.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # workers start without the folder of the script, see `against.Worker`
from against import PAUSE, RESULTS, ROOT, Worker, environment, import_checkout, revision, work

HOST = "--model MODEL --checkpoint WEIGHTS --keep 0.5 --out OUT"
WORKS = {
    "embed": f"embed IMAGES {HOST} --part-size 128",
    "finetune": f"finetune IMAGES {HOST} --recipe new-head --batch-size 32 --set max_steps=UPDATES",
}
WEIGHTS = "model.safetensors"
MODEL = "vit_tiny_patch16_224"
UPDATES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    checkouts = {"this": ROOT, "other": options.other.resolve()}
    threads = len(os.sched_getaffinity(0))
    seconds: dict[str, dict[str, list[float]]] = {name: {side: [] for side in checkouts} for name in options.works}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_images(Path(folder) / "images", options.images)
        write_weights(Path(folder) / WEIGHTS)
        workers = {side: Worker(path, threads, Path(__file__)) for side, path in checkouts.items()}
        for worker in workers.values():
            stack.callback(worker.stop)
        environments = {side: worker.ask("start", "starting", folder=folder) for side, worker in workers.items()}
        for name in options.works:
            for worker in workers.values():  # what is done once in a process
                worker.ask("run", f"preparing {name}", name=name)
            for step in range(options.rounds):
                for side in workers if step % 2 == 0 else reversed(workers):
                    time.sleep(PAUSE)
                    seconds[name][side].append(workers[side].ask("run", f"timing {name}", name=name))
                print(name, *(f"{times[-1]:.2f} s" for times in seconds[name].values()), flush=True)
    record = {
        "command": f"python benchmarks/safety.py {shlex.join(sys.argv[1:])}",
        "environment": environments["this"],
        "checkouts": {side: revision(path) for side, path in checkouts.items()},
        "images": options.images,
        "updates": UPDATES,
        "seconds": seconds,
    }
    name = "safety-cpu" if len(options.works) == len(WORKS) else f"safety-{'-'.join(options.works)}-cpu"
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = as_markdown(record)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def write_images(folder: Path, count: int) -> None:
    """Two classes of JPEG files in two splits, of 200 to 400 px, from photos."""
    import numpy as np
    from PIL import Image

    from aptvit.files.sample_photos import sample_photos

    random = np.random.default_rng(0)
    photos = [Image.fromarray(np.asarray(photo)).convert("RGB") for photo in sample_photos().values()]
    for number in range(count):
        photo = photos[number % len(photos)]
        width, height = (min(int(random.integers(200, 400)), side) for side in photo.size)
        left, top = (
            int(random.integers(0, whole - side + 1)) for whole, side in zip(photo.size, (width, height), strict=True)
        )
        split = "val" if number % 16 == 0 else "train"
        file = folder / split / f"class{number // 2 % 2}" / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((left, top, left + width, top + height)).save(file)


def write_weights(file: Path) -> None:
    """Random weights of the model."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model(MODEL).state_dict(), file)


def as_markdown(record: dict[str, Any]) -> str:
    """The record as one table."""
    lines = ["# What writing safely costs", "", "```", record["command"], "```", ""]
    lines += [f"- {key}: {value}" for key, value in record["environment"].items()]
    lines += [f"- {side}: {commit}" for side, commit in record["checkouts"].items()]
    lines += [
        f"- {record['images']} images; {record['updates']} updates of 32 images, an evaluation, the model saved",
        "",
        "Seconds of the whole command: median (fastest). The difference is that of a round, as a share of the other",
        "checkout's median: the median over rounds, with its 95 % interval (bootstrap over rounds).",
        "",
        "| command | rounds | other | this | paired difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, sides in record["seconds"].items():
        this, other = sides["this"], sides["other"]
        whole = statistics.median(other)
        median, low, high = median_interval([(a - b) / whole for a, b in zip(this, other, strict=True)])
        cells = [f"{statistics.median(times):.2f} ({min(times):.2f})" for times in (other, this)]
        lines.append(f"| {name} | {len(this)} | {' | '.join(cells)} | {median:+.2%} ({low:+.2%} to {high:+.2%}) |")
    return "\n".join(lines) + "\n"


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by the bootstrap."""
    import numpy as np

    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return statistics.median(values), float(low), float(high)


class CommandRunner:
    """Runs commands of the checkout in this process."""

    def __init__(self) -> None:
        import_checkout()
        self._folder = Path()

    def start(self, folder: str) -> dict[str, str]:
        """Machine and versions, by label.

        Args:
            folder: With ``images``, where results go.
        """
        self._folder = Path(folder)
        return environment()

    def run(self, name: str) -> float:
        """Seconds of a command.

        Args:
            name: A key of `WORKS`.

        Raises:
            RuntimeError: If the command failed.
        """
        from aptvit import cli

        out = self._folder / f"out{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        words = {"IMAGES": str(self._folder / "images"), "WEIGHTS": str(self._folder / WEIGHTS), "OUT": str(out)}
        words["MODEL"] = MODEL
        command = WORKS[name].replace("UPDATES", str(UPDATES))
        arguments = [words.get(word, word) for word in command.split()]
        printed = io.StringIO()
        start = time.perf_counter()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                cli.app(arguments, standalone_mode=False)
            except BaseException as error:
                raise RuntimeError(f"{command}: {error!r}: {printed.getvalue()[-500:]}") from None
        return time.perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work(CommandRunner)
    else:
        main()
