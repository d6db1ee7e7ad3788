"""The trial: every hostile file to every command that reads files of its kind, each in a process of its own."""

from __future__ import annotations

import importlib
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..results import Outcome, Result
from . import sandbox
from .annotations import annotations
from .archives import archives
from .case import Case, Payload
from .clips import clips
from .commands import COMMANDS, Command, Place
from .fixtures import NUM_GOOD, make_models
from .images import images
from .models import models

__all__ = ["all_cases", "trial"]

# What commands import; a fork has all of it at once.
LIBRARIES = ("accelerate", "av", "datasets", "matplotlib.pyplot", "onnxscript", "pyarrow.dataset", "pyarrow.parquet")
LIBRARIES += ("faster_coco_eval", "supervision", "torchmetrics.detection", "transformers", "webdataset.tariterators")
LIBRARIES += ("aptvit.bulk", "aptvit.cli", "aptvit.compare.clips", "aptvit.compare.comparison", "aptvit.dense")
LIBRARIES += ("aptvit.benchmark.run", "aptvit.evaluation.run", "aptvit.evaluation.training_run", "aptvit.export.check")
LIBRARIES += ("aptvit.report.page", "aptvit.report.patches", "aptvit.report.prediction_files", "aptvit.vlm")
LIBRARIES += ("aptvit.training.run_folder", "torch.utils.tensorboard", "torchvision", "yaml", "fsspec")

_READ, _BAD, _REFUSED = 0, 1, 2  # exit codes that are allowed


def all_cases(seed: int) -> list[Case]:
    """All hostile files."""
    generators = (images, models, archives, annotations, clips)
    return [case for generator in generators for case in generator(seed)]


def trial(deadline: float, seed: int) -> Iterator[Result]:
    """See `tests.trials.kinds.Trial`."""
    with tempfile.TemporaryDirectory(prefix="aptvit-trials-") as folder, sandbox.listening() as (url, visitors):
        root = Path(folder).resolve()
        _import(root)
        make_models(root / "models")
        tries = list(_tries(all_cases(seed)))
        random.Random(seed).shuffle(tries)
        only = os.environ.get("APTVIT_TRIALS_ONLY", "")
        usual: dict[str, float] = {}  # seconds of each command on good files
        for command, cases in (*_without(), *tries):
            if time.monotonic() > deadline:
                return
            name = f"{command.name}: {' + '.join(case.name for case in cases) or 'nothing hostile'}"
            if only and only not in name:
                continue
            work = sandbox.fresh(root / "work")
            payload = Payload(root / "canary", url)
            words = command.words(Place(work, root / "models", payload), cases)
            before = _listing(work)
            ended = sandbox.run(words, work, sandbox.MAX_SECONDS * max(1, len(cases)) + usual.get(command.name, 30.0))
            usual.setdefault(command.name, ended.seconds)
            outcome, detail = _verdict(ended, command, cases)
            if payload.canary.exists() or visitors:
                outcome, detail = Outcome.CODE_RUN, "the canary is there" if not visitors else "it connected"
                payload.canary.unlink(missing_ok=True)
                visitors.clear()
            elif outcome is Outcome.RIGHT and _listing(work) != before:
                outcome, detail = Outcome.CODE_RUN, f"changed {sorted(_listing(work) ^ before)[:5]}"
            yield Result(name, outcome, f"{detail}\n    {ended.seconds:.1f} s, {ended.growth / 1e6:.0f} MB, {words}")


def _import(root: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # and so no threads, which a fork would lose
    os.environ["NUMBA_CACHE_DIR"] = str(root / "numba")
    import torch

    torch.set_num_threads(1)
    for library in LIBRARIES:
        importlib.import_module(library)


def _without() -> Iterator[tuple[Command, Sequence[Case]]]:
    """Each command once with nothing hostile: it must be right, or the trial would show nothing."""
    for commands in COMMANDS.values():
        for command in commands:
            yield command, ()


def _tries(cases: Sequence[Case]) -> Iterator[tuple[Command, Sequence[Case]]]:
    for kind, commands in COMMANDS.items():
        of_kind = [case for case in cases if case.kind == kind]
        for command in commands:
            for start in range(0, len(of_kind), command.together):
                yield command, of_kind[start : start + command.together]


def _listing(work: Path) -> set[tuple[str, int, int]]:
    """Names, sizes and times of the files outside of the folders that a command may write to."""
    places = [path for path in work.iterdir() if path.name not in ("out", "tmp", "home", "log")]
    files = [path for place in places for path in (place, *(place.rglob("*") if place.is_dir() else ()))]
    return {(ascii(str(path)), (stat := path.lstat()).st_size, stat.st_mtime_ns) for path in files}


def _verdict(ended: sandbox.Ended, command: Command, cases: Sequence[Case]) -> tuple[Outcome, str]:
    said = ended.output + ended.messages
    end = "\n    ".join(ended.messages.splitlines()[-12:])
    if ended.forbidden:
        return Outcome.CODE_RUN, f"{ended.forbidden[:3]}"
    if ended.growth > sandbox.MAX_GROWTH:
        return Outcome.CRASHED, "more than 2 GB"
    if ended.code is None:
        return Outcome.HUNG, end
    if "Traceback" in said or ended.code not in (_READ, _BAD, _REFUSED):
        return Outcome.CRASHED, f"exit code {ended.code}: {end}"
    if ended.code == _REFUSED:
        lines = ended.messages[ended.messages.rfind("\naptvit: ") + 1 :].splitlines()
        if len(lines) != 1 or not lines[0].startswith("aptvit: "):
            return Outcome.CRASHED, f"no single line: {end}"
    if not cases:
        return (Outcome.RIGHT if ended.code == _READ else Outcome.CRASHED), f"exit code {ended.code}: {end}"
    silent = [case.name for case in cases if case.must_tell]
    counts_errors = command.name.startswith("embed") and ended.code == _BAD  # in the column of errors
    if silent and "hostile" not in said and not counts_errors:
        return Outcome.WRONG, f"exit code {ended.code}, nothing about {silent}: {said[-300:]}"
    if command.name == "embed" and "holds no images" not in said and f"{NUM_GOOD} images" in said and silent:
        return Outcome.LOST, said[-300:]
    if command.reports_all and ended.code != _REFUSED and command.name != "embed":
        missing = [i for i in range(NUM_GOOD) if f"good{i}.png" not in ended.output]
        if missing:
            return Outcome.LOST, f"good images {missing}: {said[-300:]}"
    return Outcome.RIGHT, ""
