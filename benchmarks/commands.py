"""README's commands on real data: that they finish, what they report, and the memory that they need.

    python benchmarks/commands.py                     # memory: trainings stop after three updates
    python benchmarks/commands.py --whole             # scores: dense trainings are smaller and shorter than by default

Each command is a process of its own, `aptvit` as installed, on a ViT-Ti/16 and the data of benchmarks/data.py. The
memory is the largest sum, over the processes of the command, of the memory that each has for itself and its share of
what they have in common (PSS), sampled twice a second.

Writes commands-memory-cpu.{json,md} or commands-whole-cpu.{json,md}; what a file holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.tables import Columns, markdown_page, markdown_table

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("APTVIT_DATA", ROOT / "data"))
RESULTS = Path(__file__).parent / "results"
WORK = ROOT / "build" / "commands"
MODEL = "--model vit_tiny_patch16_224 --checkpoint DATA/vit_tiny/vit_tiny_patch16_224.safetensors"
START = "--checkpoint DATA/vit_tiny/vit_tiny_patch16_224.safetensors --model vit_tiny_patch16_224"

CLASSIFIER = (
    f"finetune DATA/imagenette {MODEL} --recipe new-head --keep 0.5 --out run TRAINING",
    "evaluate run",
    "compare DATA/imagenette/val --model run --out compared",
    f"heal DATA/imagenette/train {MODEL} --keep 0.5 --out healed HEALING",
    f"calibrate DATA/imagenette/val {MODEL} --keep 0.5 --out config.json",
    f"evaluate DATA/imagenet_sample_test/labels.csv {MODEL} --methods apt-embedding,tome,downscale --max-images 100",
    "embed DATA/imagenette/val --model run --output predictions --format csv --out predictions.csv",
    "export DATA/imagenette/val --model run --out exported",
)
DENSE = (
    f"train-detector DATA/bccd {START} --out cells DENSE",
    "train-detector DATA/bccd --start cells --keep 0.7 --out adaptive-cells DENSE_AGAIN",
    "evaluate adaptive-cells",
    "detect DATA/photos --run adaptive-cells --out boxes",
    f"train-segmenter DATA/camvid --ignore 11 {START} --out streets PIXELS",
    "train-segmenter DATA/camvid --ignore 11 --start streets --keep 0.7 --out adaptive-streets PIXELS",
    "evaluate adaptive-streets",
    "segment DATA/photos --run adaptive-streets --out masks",
)
# What replaces the words in capitals.
SHORT = {"TRAINING": "--set max_steps=3", "HEALING": "--minutes 1", "DENSE": "--set max_steps=3"}
SHORT |= {"DENSE_AGAIN": "--set max_steps=3", "PIXELS": "--set max_steps=3"}
WHOLE = {"TRAINING": "", "HEALING": "", "DENSE": "--size 256 --epochs 2", "DENSE_AGAIN": "--size 256 --epochs 1"}
WHOLE |= {"PIXELS": "--size 256 --set max_steps=4 --set test_size=256"}


@dataclass(frozen=True)
class CommandRow(Measurement):
    """One command.

    Attributes:
        command: The command, with DATA for the folder of the data.
        status: Exit status.
        minutes: From start to end, with other work on the machine as it was.
        memory: Largest memory in GB.
        scores: What it reported last, on validation images.
    """

    identity: ClassVar[tuple[str, ...]] = ("command",)

    command: str
    status: int
    minutes: float
    memory: float
    scores: dict[str, float]


class CommandRecord(Record[CommandRow]):
    row_type = CommandRow
    contents = "commands"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="trainings to their end")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only commands with one of these words")
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: no real checkpoint and images in {DATA} (APTVIT_DATA names another folder)")
        return
    name = "whole" if options.whole else "memory"
    file, page = (RESULTS / f"commands-{name}-cpu.{ending}" for ending in ("json", "md"))
    made_by = shlex.join(["python", "benchmarks/commands.py", *sys.argv[1:]])
    record = CommandRecord.resume(file, prepare_machine("cpu"), made_by, False)
    done = {row.command for row in record.measured if row.status == 0}
    (WORK / name).mkdir(parents=True, exist_ok=True)
    commands = [written_out(command, WHOLE if options.whole else SHORT) for command in (*CLASSIFIER, *DENSE)]
    for number, command in enumerate(commands):
        later = {word for other in commands[number + 1 :] if other not in done for word in other.split()}
        folder = out_of(command)
        is_needed = folder in later and not (WORK / name / str(folder)).exists()  # of another machine's run
        if command in done and not is_needed:
            continue
        if options.only and not any(word in command for word in options.only):
            continue
        row = run(command, WORK / name)
        print(row, flush=True)
        record.put(row)
        record.save(file)
        page.write_text(as_markdown(record), encoding="utf-8")


def written_out(command: str, values: dict[str, str]) -> str:
    """A command with values for the words in capitals."""
    return " ".join(filter(None, (values.get(word, word) for word in command.split())))


def out_of(command: str) -> str | None:
    """What a command writes."""
    words = command.split()
    return words[words.index("--out") + 1] if "--out" in words else None


def run(command: str, folder: Path) -> CommandRow:
    """Run a command in a folder, and watch its memory."""
    words = command.replace("DATA/", f"{DATA.resolve()}/").split()
    name = out_of(command)
    out = None if name is None else folder / name
    if out is not None and out.is_dir():
        shutil.rmtree(out)
    start, largest = time.perf_counter(), 0
    with (folder / "output.txt").open("a") as output:
        print(f"$ aptvit {command}", file=output, flush=True)
        process = subprocess.Popen([sys.executable, "-m", "aptvit", *words], cwd=folder, stdout=output, stderr=output)
        while process.poll() is None:
            largest = max(largest, memory_of(process.pid))
            time.sleep(0.5)
    minutes = (time.perf_counter() - start) / 60
    return CommandRow(command, process.returncode, minutes, largest / 1e9, last_scores(out))


def memory_of(process: int) -> int:
    """Bytes of a process and all that it started."""
    total = 0
    try:
        root = psutil.Process(process)
        for each in (root, *root.children(recursive=True)):
            info = each.memory_full_info()
            total += getattr(info, "pss", info.uss)
    except psutil.Error:  # it ended
        pass
    return total


def last_scores(out: Path | None) -> dict[str, float]:
    """Numbers of the last evaluation of a training, at its own share of the tokens; empty for other commands."""
    results = None if out is None else out / "results.json"
    if results is None or not results.is_file():
        return {}
    evaluations: list[dict[str, Any]] = json.loads(results.read_text())["evaluations"]
    at_share = [each for each in evaluations if each.get("share") == evaluations[0].get("share")]
    return {name: value for name, value in at_share[-1].items() if isinstance(value, float)} if at_share else {}


def as_markdown(record: CommandRecord) -> str:
    """The page of a record."""
    columns: Columns = (
        ("command", lambda row: f"`aptvit {row.command}`"),
        ("exit status", lambda row: str(row.status)),
        ("memory, GB", lambda row: f"{row.memory:.1f}"),
    )
    if any(map(_scores, record.measured)):
        columns = (*columns, ("minutes", lambda row: f"{row.minutes:.1f}"), ("scores", _scores))
    table = markdown_table(columns, list(record.measured))
    return markdown_page("README's commands", record.commands, record.environment, table)


SHOWN = ("kept", "top1", "agreement", "map", "map_50", "mean_iou", "miou")


def _scores(row: CommandRow) -> str:
    """Scores of a training to its end."""
    if "max_steps" in row.command or "--minutes 1" in row.command:
        return ""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in row.scores.items() if name in SHOWN)


if __name__ == "__main__":
    main()
