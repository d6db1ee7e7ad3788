"""What dense tasks lose: a uniform detector and a uniform segmenter made adaptive, at about 30 and 50 % fewer tokens.

    python benchmarks/dense.py                       # hours on two cores; an interrupted run goes on
    python benchmarks/dense.py --only segmentation --seeds 1
    python benchmarks/dense.py --seeds 1 --only segmentation --methods start chosen heal --name dense-chosen-cpu
    python benchmarks/dense.py --seeds 1 --size 480 --only detection --methods start spread heal --name dense-480-cpu
    python benchmarks/dense.py --seeds 2 --size 480 --only detection --methods start downscaled spread \\
        --heal-epochs 24 --area-bias 0.5 --name dense-480-long-cpu
    python benchmarks/dense.py --seeds 1 --size 432 --precision bfloat16 --only segmentation --name dense-720-cpu
    python benchmarks/dense.py --only segmentation --size 576 --epochs 36 --precision bfloat16 --parallel 6 --workers 2

First the uniform network is trained from a classifier's weights, and adaptive ones in the same way (`start-apt`, and
`start-preview` in two passes). From the uniform one of the same seed, each method is trained for one more epoch at a
smaller rate: uniform (more of the same), adaptive, adaptive with resized patches only (no sub-patch branch), and
adaptive with all but that branch frozen; these four without what refines maps where patches are coarse. `heal` has
it, and learns the uniform network's maps, no labels; patches are chosen by entropy, and for `spread` by how much of
what the uniform network says differs inside them, foreseen. `chosen` is that choice alone: nothing else is learned,
and for `preview` nothing at all: the network reads all in big patches first, and finely where what it says differs;
both passes count in its share of the tokens. `tuned` trains all of it on labels after that, a quarter of the epochs
at a third of the rate, beside `tuned-uniform`, and `tuned-preview` likewise, `tuned-both` in turn with nothing
merged. `downscaled` is the uniform network on smaller pictures. With `--test-size` street scenes are evaluated at
another size than was trained for, `whole` is the uniform network there. Writes dense-DEVICE.{json,md,svg}, on a GPU
if there is one. Checkpoint and photos are those of benchmarks/data.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from aptvit.hosts.pretrained import load_host
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.plots import make_panels, write_plots
from aptvit.measuring.tables import Columns, markdown_page, section
from aptvit.storage.writing import write_json
from aptvit.training import load_recipe
from aptvit.training.log import read_log
from aptvit.training.run_folder import sources_of, write_origin
from aptvit.training.trainer import Training

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
MODEL = "vit_tiny_patch16_224"
CHECKPOINT = DATA / "vit_tiny" / f"{MODEL}.safetensors"
RESULTS = Path(__file__).parent / "results"
SHARES = (0.7, 0.5)
PREVIEWED = (0.58,)  # where a third is read finely
EPOCHS = 12
HEAL_EPOCHS = 6
RECALIBRATE = 46  # updates, an epoch of street scenes
COMMON = {"scales": 2, "drop_path": 0.0}
WHOLE = 480 / 288  # street scenes are evaluated whole: their longer side, over that of the crops that are learned from
# Street scenes of 480 x 360; blood cells of 640 x 480.
LONG: dict[str, dict[str, Any]] = {
    "segmentation": {"size": 288, "jitter": [0.8, 2.0], "channels": 64, "batch_size": 8, "lr": 3e-4}
    | {"slide": False, "ignore": [11, 255], "layer_decay": 0.85},
    "detection": {"size": 320, "jitter": [0.5, 1.5], "channels": 32, "batch_size": 4, "lr": 3e-4}
    | {"layer_decay": 0.85},
}
SHORT = {"epochs": 1, "lr": 3e-5, "eval_every": 0, "detail": False}  # a tenth of the rate, 8 % of the iterations
TUNE = {"lr": 1e-4, "eval_every": 0, "resize_only": True}  # boxes need details, classes of pixels do not
# No gradient goes through the backbone; pictures are at the scale at which they are evaluated.
HEAL: dict[str, dict[str, Any]] = {
    "segmentation": {"lr": 1e-4, "layer_decay": 1.0, "eval_every": 0, "jitter": [WHOLE, WHOLE]} | {"distort": 0.0},
    "detection": {"lr": 1e-4, "layer_decay": 1.0, "eval_every": 0, "jitter": [1.0, 1.0]},
}
FOLDER = {"segmentation": "camvid", "detection": "bccd"}
RECIPE = {"segmentation": "segmenter", "detection": "detector"}
SCORES = {"segmentation": ("miou", "accuracy"), "detection": ("map", "map_50")}
# What a method is compared with: as long on labels, nothing merged.
BESIDE = dict.fromkeys(("tuned", "tuned-preview", "tuned-both"), "tuned-uniform")
BESIDE |= dict.fromkeys(("apt", "resize", "branch"), "uniform")

_UNIFORM = ("start", "whole", "uniform", "tuned-uniform", "downscaled")
_OF_START = ("preview", "chosen", "tuned", "tuned-preview", "tuned-both", "spread", "downscaled", "heal")
_OF_START += ("apt", "resize", "branch")
_METHODS = ("start", "start-apt", "start-preview", "whole", "tuned-uniform", "uniform", *_OF_START)
# Methods without labels, and their scorers.
_UNLABELLED = {"heal": "entropy", "spread": "spread", "chosen": "spread", "preview": "preview"}
_UNTRAINED = ("chosen", "preview")

# What all trainings of a file have in common, and what those had whose record does not say.
_SAME: dict[str, Any] = {
    "size": None,
    "precision": "float32",
    "epochs": EPOCHS,
    "heal_epochs": HEAL_EPOCHS,
    "tuned_epochs": None,
    "test_size": None,
}

Job = tuple[str, str, float, int]  # task, method, share of the tokens, seed


@dataclass(frozen=True)
class Setting:
    """What all trainings of a file have in common.

    Attributes:
        size: Of crops in pixels; None for the sizes of ``LONG``.
        precision: To compute in.
        epochs: Of the uniform network.
        workers: Processes that read, for each training.
        heal_epochs: Of learning maps.
        tuned_epochs: On labels of what is made of the uniform network; None for a quarter of its own.
        area_bias: Of networks that are made adaptive.
        test_size: Longer side of street scenes when they are evaluated, in pixels; None for the scale of the crops.
        work: Folder of the trainings.
    """

    size: int | None
    precision: str
    epochs: int
    workers: int
    heal_epochs: int
    tuned_epochs: int | None
    area_bias: float
    test_size: int | None
    work: Path

    def size_of(self, task: str) -> int:
        size: int = self.size or LONG[task]["size"]
        return size

    def folder(self, job: Job) -> Path:
        task, method, keep, seed = job
        bias = self.bias_of(method)
        name = f"{task}-{method}-{keep:g}-{seed}" + (f"-bias-{bias:g}" if bias else "")
        return self.work / (name if self.test_size is None or method == "start" else f"{name}-at-{self.test_size}")

    def bias_of(self, method: str) -> float:
        return 0.0 if method in _UNIFORM else self.area_bias


@dataclass(frozen=True)
class DenseRow:
    """One training.

    Attributes:
        task: "segmentation" or "detection".
        method: "start" for the uniform network itself, "start-apt" for the adaptive one trained as it was, or as in a
            recipe.
        keep: Share of the tokens asked for.
        seed: Of the training.
        before: Scores without it.
        after: Scores after it.
        curve: (epochs, scores) on the way.
        seconds: Of training.
        speedup: Of forward and backward of the whole network, beside nothing merged.
        area_bias: What a patch's area added to its attention.
    """

    task: str
    method: str
    keep: float
    seed: int
    before: dict[str, float]
    after: dict[str, float]
    curve: list[dict[str, float]]
    seconds: float
    speedup: float | None
    area_bias: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(LONG), help="one task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=_METHODS, help="only these")
    parser.add_argument(
        "--keep", type=float, nargs="*", default=[1.0, *SHARES, *PREVIEWED], help="only these shares of the tokens"
    )
    parser.add_argument("--size", type=int, help="of crops in pixels; 288 and 320 by default")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the uniform network")
    parser.add_argument("--heal-epochs", type=int, default=HEAL_EPOCHS, help="of learning maps")
    parser.add_argument("--tuned-epochs", type=int, help="on labels after that; a quarter of --epochs unless given")
    parser.add_argument("--area-bias", type=float, default=0.0, help="what a patch's area adds to its attention")
    parser.add_argument("--test-size", type=int, help="longer side of street scenes when they are evaluated, in pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes that read, for each training")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at once; what a step costs is then not told")
    parser.add_argument("--name", help="of the files; dense-DEVICE by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("build") / "dense", help="folder of the trainings")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds already")
    options = parser.parse_args()
    if not CHECKPOINT.is_file():
        print(f"skipped: no real checkpoint and photos in {DATA} (APTVIT_DATA names another folder)")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = options.name or f"dense-{device}"
    file, page = options.out / f"{name}.json", options.out / f"{name}.md"
    record: dict[str, Any] = {"commands": [], "environment": {}, "rows": []}
    if file.is_file() and not options.fresh:
        record = json.loads(file.read_text())
    for name_of, default in _SAME.items():
        value, before = getattr(options, name_of), record.get(name_of, default)
        if record["rows"] and before != value:
            raise SystemExit(f"{file} holds trainings with --{name_of.replace('_', '-')} {before}: give another --name")
        record[name_of] = value
    command = shlex.join(["python", "benchmarks/dense.py", *sys.argv[1:]])
    record["commands"] = list(dict.fromkeys([*record["commands"], command]))
    record["environment"] = prepare_machine(device)
    setting = Setting(
        options.size,
        options.precision,
        options.epochs,
        options.workers,
        options.heal_epochs,
        options.tuned_epochs,
        options.area_bias,
        options.test_size,
        options.work,
    )
    done = {(row["task"], row["method"], row["keep"], row["seed"], _bias(row)) for row in record["rows"]}
    jobs = [
        job
        for job in (_jobs(options.seeds) if options.test_size is None else _jobs_elsewhere(options.seeds))
        if (*job, setting.bias_of(job[1])) not in done and options.only in (None, job[0]) and job[2] in options.keep
        if not options.methods or job[1] in options.methods
    ]
    for row in run_all(jobs, setting, options.parallel):
        print(row, file=sys.stderr)
        record["rows"].append({**asdict(row), "device": record["environment"]["device"]})
        write_json(file, record, indent=1)
        page.write_text(as_markdown(record), encoding="utf-8")
        write_plots({"": draw(record)}, options.out, name)


def _jobs(seeds: int) -> list[Job]:
    """All trainings, those that say most first."""
    jobs = []
    for seed in range(seeds):
        jobs += [
            (task, method, keep, seed) for method, keep in (("start", 1.0), ("start-apt", SHARES[0])) for task in LONG
        ]
    for seed in range(seeds):
        for task in LONG:
            jobs += [(task, method, 1.0, seed) for method in ("tuned-uniform", "uniform")]
            jobs += [(task, method, keep, seed) for keep in reversed(SHARES) for method in _OF_START]
            jobs += [(task, "preview", keep, seed) for keep in PREVIEWED]
            jobs += [(task, "start-preview", keep, seed) for keep in reversed(SHARES)]
    return jobs


def _jobs_elsewhere(seeds: int) -> list[Job]:
    """What trains nothing, for pictures of another size than was trained for."""
    shares = [("whole", 1.0), *((method, keep) for keep in reversed(SHARES) for method in ("preview", "downscaled"))]
    shares += [("preview", keep) for keep in PREVIEWED]
    return [("segmentation", method, keep, seed) for seed in range(seeds) for method, keep in shares]


def _quarter(epochs: int) -> int:
    return max(1, epochs // 4)


def _share_of_model(job: Job) -> float:
    """What a model is told, so that it reads the share of a job, first pass included."""
    _, method, keep, _ = job
    return (12 * keep + 1) / 16 if _reads_twice(method) else keep


def _reads_twice(method: str) -> bool:
    return method in ("preview", "tuned-preview", "tuned-both", "start-preview")


def _with_first_pass(keep: float) -> float:
    """Tokens that go through the blocks: a quarter, and again all that are not coarse."""
    return 1 / 4 + keep - (1 - keep) / 3


def _start_of(job: Job) -> Job | None:
    """The training that this one begins with."""
    task, method, _, seed = job
    return None if method.startswith("start") else (task, "start", 1.0, seed)


def run_all(jobs: list[Job], setting: Setting, parallel: int) -> Iterator[DenseRow]:
    """Rows as they are finished; where several run at once, each as soon as what it begins with is there."""
    if parallel == 1:
        yield from (run(job, setting) for job in jobs)
        return
    missing = {_start_of(job) for job in jobs} - {None, *jobs}
    there = {one for one in missing if one and (setting.folder(one) / "model").is_dir()}
    waiting = [*jobs, *(one for one in missing - there if one)]
    running: dict[Future[DenseRow], Job] = {}
    # CUDA wants processes that are not forked; what reads for them may be.
    spawned, forked = multiprocessing.get_context("spawn"), (None, True)
    with ProcessPoolExecutor(parallel, spawned, multiprocessing.set_start_method, forked) as pool:
        while waiting or running:
            ready = [job for job in waiting if _start_of(job) in {None, *there}]
            waiting = [job for job in waiting if job not in ready]
            running |= {pool.submit(run, job, setting, alone=False): job for job in ready}
            for finished in wait(running, return_when=FIRST_COMPLETED).done:
                job, row = running.pop(finished), finished.result()
                there.add(job)
                if job in jobs:
                    yield row


def run(job: Job, setting: Setting, alone: bool = True) -> DenseRow:
    """One training, or the rest of one."""
    task, method, keep, seed = job
    values = {**COMMON, **LONG[task], "workers": setting.workers, "precision": setting.precision, "seed": seed}
    values |= {"method": method, "keep": _share_of_model(job)}
    values |= {"epochs": setting.epochs, "eval_every": _quarter(setting.epochs)}
    size = setting.size_of(task)
    side = size if task == "detection" else setting.test_size or round(size * WHOLE)
    values |= {"size": size} | ({} if task == "detection" else {"test_size": side})
    name, start, begin = RECIPE[task], None, _start_of(job)
    if begin is None:
        values |= {"method": "uniform" if method == "start" else "apt", "detail": False}
        # What a network says changes most while it learns to say anything.
        values |= {"scorer": "preview", "recalibrate": RECALIBRATE} if method == "start-preview" else {}
    else:
        heal = HEAL[task] | {"epochs": setting.heal_epochs}
        values |= heal if method in _UNLABELLED else TUNE if "tuned" in method else SHORT
        start = setting.folder(begin)
        if not (start / "model").is_dir():  # measured elsewhere: it is needed all the same
            run(begin, setting)
    smaller = round(side * keep**0.5)
    if method in ("whole", "downscaled"):
        values |= {"method": "uniform", "epochs": 0}
        values |= {"size": smaller} if task == "detection" else {"test_size": smaller}
    if "tuned" in method:
        scorer = "preview" if _reads_twice(method) else "spread"
        values |= {"method": "uniform"} if method == "tuned-uniform" else {"method": "apt", "scorer": scorer}
        values |= {"epochs": setting.tuned_epochs or _quarter(setting.epochs)}
        values |= {"detail": task == "detection" and scorer == "spread"}
        values |= {"keep_also": [1.0]} if method == "tuned-both" else {}
    if method == "branch":  # the paper's way: all that was there is frozen
        values |= {"method": "apt", "trains": "new", "new_lr": 10}
    if method in _UNLABELLED:
        values |= {"method": "apt", "scorer": _UNLABELLED[method]}
        values |= {"detail": False, "epochs": 0} if method in _UNTRAINED else {}
        name = f"{name}-heal"
    recipe = load_recipe(name, {**values, "area_bias": setting.bias_of(method)})
    folder = setting.folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    images, aside = sources_of(str(DATA / FOLDER[task]), recipe)
    training = Training(recipe, load_host(MODEL, CHECKPOINT), images, aside, folder, start)
    write_origin(folder, recipe, data=str(DATA / FOLDER[task]), model=MODEL, checkpoint=str(CHECKPOINT), img_size=None)
    told = training.run(resume=True)
    if not told["finished"]:
        raise SystemExit("stopped: the same command goes on with this row")
    names = (*SCORES[task], "kept", "kept_content")
    found = [line for line in read_log(folder) if line["what"] == "eval"]
    found = [line for line in found if not recipe.keep_also or line["share"] == recipe.keep]
    if method == "downscaled":
        found = [{**line, **dict.fromkeys(("kept", "kept_content"), (smaller / side) ** 2)} for line in found]
    if _reads_twice(method):
        found = [line | {name: _with_first_pass(line[name]) for name in ("kept", "kept_content")} for line in found]
    per_epoch = training.updates_per_epoch
    curve = [{"epoch": line["update"] / per_epoch, **{name: line[name] for name in names}} for line in found]
    before, after = ({name: line[name] for name in names} for line in (found[0], found[-1]))
    speedup = told["speedup"]["median"] if told["speedup"] and alone else None
    return DenseRow(task, method, keep, seed, before, after, curve, told["seconds"], speedup, setting.bias_of(method))


Groups = dict[tuple[float, str, float], list[dict[str, Any]]]  # by share, method and area bias


def _bias(row: dict[str, Any]) -> float:
    bias: float = row.get("area_bias", 0.0)
    return bias


def _grouped(record: dict[str, Any], task: str) -> Groups:
    groups: Groups = {}
    for row in record["rows"]:
        if row["task"] == task:
            groups.setdefault((row["keep"], row["method"], _bias(row)), []).append(row)
    order = ["start", "whole", "start-apt", "start-preview", "uniform", "tuned-uniform", "downscaled", "preview"]
    order += ["preview-on-top", "preview-choice", "chosen", "tuned-preview", "tuned-both", "tuned", "spread", "heal"]
    order += ["apt", "resize", "branch"]
    return {key: groups[key] for key in sorted(groups, key=lambda key: (-key[0], order.index(key[1]), key[2]))}


def _label(method: str, bias: float) -> str:
    return f"{method}, area bias {bias:g}" if bias else method


def _spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") if values else ""


def _score_of(rows: list[dict[str, Any]], when: str, name: str) -> str:
    return _spread([100 * row[when][name] for row in rows])


def _to_uniform(groups: Groups, method: str, rows: list[Any], name: str) -> list[float]:
    """Points more or less than the uniform network of the same seed that was trained as long."""
    uniform = {
        (its, row["seed"]): row["after"][name] for its in BESIDE.values() for row in groups.get((1.0, its, 0.0), [])
    }
    for its in ("start", "whole"):  # at the size that is evaluated
        uniform |= {("start", row["seed"]): row["after"][name] for row in groups.get((1.0, its, 0.0), [])}
    if rows[0]["keep"] == 1:
        return []
    pairs = [(row["after"][name], uniform.get((BESIDE.get(method, "start"), row["seed"]))) for row in rows]
    return [100 * (one - other) for one, other in pairs if other is not None]


_ABOUT = """
ViT-Ti. `start`: the uniform network, {epochs} epochs at {lr:g} from a classifier's weights, crops of {size}
pixels{whole}, {precision}. `start-apt`: adaptive from the beginning, same recipe and seed; `start-preview`: likewise,
in two passes. The others begin with `start` of their seed and train for {short[epochs]} more epoch at {short[lr]:g}.
`branch`: adaptive, all frozen but the sub-patch branch. `heal`: with details of coarse cells, which learn the uniform
network's maps for {healed} epochs, without labels; all else is frozen, and `before` is with their blur. `spread`: the
same, with patches chosen by how much of what the uniform network says is foreseen to differ inside them; `chosen`:
that choice alone, no details; `preview`: nothing is learned, the network reads all in big patches first, and finely
where what it says differs, both passes counted; `preview-choice` and `preview-on-top`: an earlier form, no longer
here, that read the picture at half the size first, whose tokens are not counted, and read coarse patches again all
the same; on top, what was seen first stands there in the maps; `whole`: `start` on larger pictures than it was
trained for; `tuned`: all of it trained on labels after that, {tuned} epochs at {tune[lr]:g}, beside
`tuned-uniform`{details}, and `tuned-preview` likewise, of `preview`, `tuned-both` in turn with nothing merged; all
others by entropy. `downscaled`: `start` on pictures with as many fewer pixels. Mean over seeds, with standard
deviation; `to uniform`: in pairs of the same seed, both trained as long. Tokens are those of the pictures, without
padding; in brackets with it.
"""


def as_markdown(record: dict[str, Any]) -> str:
    here = record["environment"]["device"]
    elsewhere = {row["method"]: f"on {row['device']}" for row in record["rows"] if row.get("device", here) != here}
    tables = [_section(record, task, _grouped(record, task)) for task in LONG]
    return markdown_page("Dense tasks", record["commands"], record["environment"] | elsewhere, *tables)


def _section(record: dict[str, Any], task: str, groups: Groups) -> str:
    first, second = SCORES[task]
    size = record.get("size") or LONG[task]["size"]
    side = record.get("test_size") or size * WHOLE
    about = _ABOUT.format(
        epochs=record.get("epochs", EPOCHS),
        tuned=record.get("tuned_epochs") or _quarter(record.get("epochs", EPOCHS)),
        lr=LONG[task]["lr"],
        size=size,
        whole=f", whole images of {side:.0f}" if task == "segmentation" else "",
        precision=record.get("precision", "float32"),
        short=SHORT,
        healed=record.get("heal_epochs", HEAL_EPOCHS),
        tune=TUNE,
        details=", with details" if task == "detection" else "",
    )

    def tokens(rows: list[dict[str, Any]]) -> str:
        kept = [mean(row["after"][name] for row in rows) for name in ("kept_content", "kept")]
        return f"{kept[0]:.0%} ({kept[1]:.0%})"

    def faster(rows: list[dict[str, Any]]) -> str:
        known = [row["speedup"] for row in rows if row["speedup"] is not None]
        return f"{mean(known):.2f}" if known else ""

    columns: Columns = (
        ("method", lambda group: _label(*group[0][1:])),
        ("tokens", lambda group: tokens(group[1])),
        (f"before: {first}", lambda group: _score_of(group[1], "before", first)),
        (f"after: {first}", lambda group: _score_of(group[1], "after", first)),
        ("to uniform", lambda group: _spread(_to_uniform(groups, group[0][1], group[1], first), "+")),
        (second, lambda group: _score_of(group[1], "after", second)),
        ("training, s", lambda group: f"{min(row['seconds'] for row in group[1]):.0f}"),
        ("step speed-up", lambda group: faster(group[1])),
    )
    return section(f"{task.capitalize()}: {FOLDER[task]}", " ".join(about.split()), columns, list(groups.items()))


_COLOURS = {
    "apt": "#0072B2",
    "resize": "#D55E00",
    "branch": "#009E73",
    "heal": "#CC79A7",
    "spread": "#E69F00",
    "chosen": "#56B4E9",
    "preview": "#882255",
    "downscaled": "#999999",
    "tuned": "#000000",
    "tuned-preview": "#117733",
    "tuned-both": "#999933",
}


def draw(record: dict[str, Any]) -> Any:
    """Scores on the way to the uniform network, and what is lost of them against the tokens, in pairs of one seed."""
    tasks = [task for task in LONG if _grouped(record, task)]
    figure, panels = make_panels(len(tasks), 2, (10, 3.4 * len(tasks)))
    for (left, right), task in zip(panels, tasks, strict=True):
        name = SCORES[task][0]
        groups = _grouped(record, task)
        for row in groups.get((1.0, "start", 0.0), []):
            points = [(point["epoch"], 100 * point[name]) for point in row["curve"]]
            left.plot(*zip(*points, strict=True), "o-", color="#444444", label=f"seed {row['seed']}")
        left.set(xlabel="epochs of the uniform network", ylabel=f"{task}: {name}, %")
        left.set_visible(left.has_data())
        right.axhline(0, color="#444444", linewidth=1, label="uniform")
        for (method, colour), bias in product(_COLOURS.items(), sorted({key[2] for key in groups})):
            points = [
                (100 * mean(row["after"]["kept_content"] for row in rows), mean(found))
                for (_, *key), rows in groups.items()
                if key == [method, bias] and (found := _to_uniform(groups, method, rows, name))
            ]
            if points:
                style = "s--" if bias else "o-"
                right.plot(*zip(*points, strict=True), style, color=colour, label=_label(method, bias))
        right.set(xlabel="tokens of the images, %", ylabel=f"{name}, points to uniform")
        for panel in (left, right):
            if panel.has_data():
                panel.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
