"""Commands that write, in small: what they are given, how they are continued, and what must come out of them."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import sandbox
from .fixtures import class_folders, good_images, make_models, masks, voc
from .results import Outcome, Result

__all__ = ["SECONDS", "WORKS", "Usual", "Work", "differences", "size_of", "try_works"]

SECONDS = 60.0  # after which a command hangs


@dataclass(frozen=True)
class Work:
    """A command that writes.

    Attributes:
        name: Its name.
        data: Writes its data into a folder.
        words: The command line, without ``--out out``; MODELS stands for the folder of models.
        results: Reads what it wrote into ``out``: values by name, which are the same whenever it is run.
        resumes: Whether ``--resume`` continues it; otherwise the same command does.
    """

    name: str
    data: Callable[[Path], object]
    words: Sequence[str]
    results: Callable[[Path], dict[str, Any]]
    resumes: bool = False

    def run(self, folder: Path, models: Path, again: bool = False, **options: Any) -> sandbox.Ended:
        """Run it in a folder in which `data` wrote ``data``.

        Args:
            folder: The folder.
            models: Folder of `fixtures.make_models`.
            again: Whether it ran there before.
            options: As for `sandbox.run`.
        """
        words = [word.replace("MODELS", str(models)) for word in self.words]
        return sandbox.run(
            [*words, "--out", "out", *(["--resume"] if again and self.resumes else [])], folder, **options
        )


@dataclass(frozen=True)
class Usual:
    """What comes of a work that nothing disturbs.

    Attributes:
        results: As `Work.results`.
        seconds: How long it takes.
        size: Bytes of what it writes, in whole pages.
    """

    results: dict[str, Any]
    seconds: float
    size: int


Attempt = Callable[[Work, Path, Usual, random.Random, int], Iterator[Result]]
"""Disturbs a work: it, a folder with ``models`` and an empty ``work``, what usually comes of it, and a number."""


def try_works(deadline: float, seed: int, attempt: Attempt) -> Iterator[Result]:
    """Disturb one work after the other until the deadline, as `tests.trials.kinds.Trial`."""
    rng = random.Random(seed)
    usual: dict[str, Usual] = {}
    with tempfile.TemporaryDirectory(prefix="aptvit-trials-") as place:
        root = Path(place).resolve()
        sandbox.import_libraries(root)
        make_models(root / "models")
        for number in itertools.count():
            if number and time.monotonic() > deadline:
                return
            work, folder = WORKS[number % len(WORKS)], sandbox.fresh(root / "work")
            work.data(folder / "data")
            if work.name not in usual:
                ended = work.run(folder, root / "models", seconds=SECONDS)
                if ended.code:
                    yield Result(f"{work.name}: not disturbed", Outcome.CRASHED, ended.messages[-2000:])
                    return
                usual[work.name] = Usual(work.results(folder / "out"), ended.seconds, size_of(folder / "out"))
                work.data(sandbox.fresh(folder) / "data")
            yield from attempt(work, root, usual[work.name], rng, number)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def differences(results: dict[str, Any], expected: dict[str, Any]) -> str:
    """What is missing, added or another in results; empty if nothing is."""
    if results.keys() != expected.keys():
        return f"{sorted(results.keys() ^ expected.keys())[:5]} are only in one of both"
    changed = [name for name, value in expected.items() if not np.array_equal(results[name], value)]
    return f"{len(changed)} of {len(expected)} differ, such as {changed[0]}" if changed else ""


def _weights(out: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(out / "model" / "model.safetensors"))


def _rows(out: Path) -> dict[str, Any]:
    import pyarrow.parquet

    parts = [pyarrow.parquet.read_table(path).to_pylist() for path in sorted(out.glob("part-*.parquet"))]
    rows = [row for part in parts for row in part]
    numbered = {f"{row['file']} {number}": row for number, row in enumerate(rows)}  # a row twice is a difference
    return {name: np.float32(row["feature"] or []) for name, row in numbered.items()}


def _accuracies(out: Path) -> dict[str, Any]:
    (file,) = out.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    return {str(row["method"]): [row["tokens"], row["top1"], row["agrees"]] for row in rows}


def _thresholds(out: Path) -> dict[str, Any]:
    return {"thresholds": json.loads((out / "config.json").read_text())["aptvit"]["thresholds"]}


def _graph(out: Path) -> dict[str, Any]:
    return {path.name: path.stat().st_size for path in out.iterdir() if path.name == "export.json"}


def _labelled(folder: Path) -> None:
    good_images(folder, 6)
    lines = [f"good{i}.png,{i % 2}" for i in range(6)]
    (folder / "labels.csv").write_text("\n".join(["file,class_index", *lines]) + "\n")


def _training(command: str, *words: str) -> tuple[str, ...]:
    values = ("precision=float32", "workers=0", "batch_size=2", "lr=1e-3", "save_every=1", "hold_back=0", "epochs=3")
    settings = [word for value in (*values, *words) for word in ("--set", value)]
    return (command, "data", "--model", "MODELS/model", *settings)


_DENSE = ("size=64", "channels=16", "method=apt")
_MODEL = ("--model", "MODELS/model")
_METHODS = ("--methods", "downscale,tome,random", "--keeps", "0.5,0.7", "--rounds", "1", "--timed-images", "2")

WORKS = (
    Work("embed", lambda folder: good_images(folder, 40), ("embed", "data", *_MODEL, "--part-size", "2"), _rows),
    Work("finetune", class_folders, _training("finetune"), _weights, resumes=True),
    Work("heal", lambda folder: good_images(folder, 6), _training("heal", "max_minutes=0"), _weights, resumes=True),
    Work("train-detector", voc, _training("train-detector", *_DENSE), _weights, resumes=True),
    Work("train-segmenter", masks, _training("train-segmenter", *_DENSE), _weights, resumes=True),
    Work("evaluate", _labelled, ("evaluate", "data/labels.csv", *_MODEL, *_METHODS), _accuracies),
    Work("calibrate", lambda folder: good_images(folder, 20), ("calibrate", "data", *_MODEL), _thresholds),
    Work(
        "export",
        good_images,
        (
            "export",
            "data",
            "--model",
            "test_vit",
            "--checkpoint",
            "MODELS/weights.safetensors",
            "--format",
            "torch-export",
        ),
        _graph,
    ),
)
