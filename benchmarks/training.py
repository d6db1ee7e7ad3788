"""What fine-tuning gives: with labels (uniform, random, resized and adaptive patches alike) and without (healing).

The recipe new-head is measured beside a plain loop of timm's parts.

    python benchmarks/training.py                      # about two hours on two cores; an interrupted run goes on
    python benchmarks/training.py --only heal --minutes 0 --set max_steps=160   # updates decide, not the clock
    python benchmarks/training.py --new-head --name new-head-cpu    # classes that the checkpoint does not have

Writes training-DEVICE.{json,md}, on a GPU if there is one. Checkpoint and photos are those of
benchmarks/data.py.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

import torch
from timm.data import ImageNetInfo, create_transform
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from aptvit.datasets.sources import Source
from aptvit.files.images import find_images
from aptvit.hosts.pretrained import Host, load_host
from aptvit.measuring.machine import prepare_machine
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.tables import Columns, markdown_page, section
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.training import Recipe, find_sources, hold_back, load_recipe, photos
from aptvit.training.data import DeviceAugmentation, ImageDataset, make_loader
from aptvit.training.trainer import Training

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
MODEL = "vit_tiny_patch16_224"
CHECKPOINT = DATA / "vit_tiny" / f"{MODEL}.safetensors"
RESULTS = Path(__file__).parent / "results"
SHARES = (0.67, 0.51)
# Labels: one epoch from a model that knows the classes, the pictures cropped and mirrored at random.
LABELS = {"epochs": 1, "batch_size": 32, "lr": 3e-5, "new_lr": 10, "warmup": 0.1, "crop": 0.5, "flip": 0.5}
LABELS |= {"precision": "float32", "workers": 0, "per_image": True, "eval_every": 0, "layer_decay": 0.99}


NEW_HEAD = {"epochs": 1, "precision": "float32", "workers": 0, "eval_every": 0}
TIMM_LOOP = "uniform, loop of timm's parts, learning rate "
TIMM_RATES = (2e-4, 5e-4, 1e-3)  # of the last layer


@dataclass(frozen=True)
class TrainingRow(Measurement):
    """One training, or one model before it.

    Attributes:
        task: "labels", "heal" or "new-head".
        method: As in a recipe; of adaptive patches with the scorer, or how the branch starts.
        keep: Share of the tokens options for.
        seed: Of the training; of healing, which half of the photos it was fitted on.
        before: Metrics without training.
        after: Metrics after it.
        seconds: Of training.
        speedup: Of forward and backward, beside uniform training.
        updates: Of training; None in records that do not hold them.
    """

    identity: ClassVar[tuple[str, ...]] = ("task", "method", "keep", "seed")

    task: str
    method: str
    keep: float
    seed: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    speedup: float | None
    updates: int | None = None


class TrainingRecord(Record[TrainingRow]):
    row_type = TrainingRow
    contents = "trainings"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("labels", "heal"), help="one part")
    parser.add_argument("--new-head", action="store_true", help="instead: a new classifier, beside a loop of timm")
    parser.add_argument("--methods", nargs="*", help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="of healing, for each model; 0 for any")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="values of the recipe of healing")
    parser.add_argument("--name", help="of the files; training-DEVICE by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds already")
    options = parser.parse_args()
    if not CHECKPOINT.is_file():
        print(f"skipped: no real checkpoint and photos in {DATA} (APTVIT_DATA names another folder)")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    file, page = (options.out / f"{options.name or f'training-{device}'}.{ending}" for ending in ("json", "md"))
    command = shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]])
    record = TrainingRecord.resume(file, prepare_machine(device), command, options.fresh)
    done = {row.key for row in record.rows}
    healing = {"max_minutes": options.minutes, **dict(value.split("=", 1) for value in options.set)}
    if options.new_head:
        jobs = _new_head_jobs(options.seeds)
    else:
        jobs = [job for job in _jobs(options.seeds, healing) if options.only in (None, job[0])]
    for task, method, keep, seed, recipe in jobs:
        if (task, method, keep, seed) in done or (options.methods and method not in options.methods):
            continue
        for row in run(task, method, recipe):
            print(row, file=sys.stderr)
            record.put(row)
        record.save(file)
        page.write_text(as_markdown(record), encoding="utf-8")
    page.write_text(as_markdown(record), encoding="utf-8")


def _jobs(seeds: int, healing: dict[str, Any]) -> list[tuple[str, str, float, int, Recipe]]:
    """All trainings, those that say most first."""
    jobs = []
    for fold in range(2):
        for method in ("apt", "downscale", "tome"):
            for keep in (0.51,) if method == "apt" else SHARES[::-1]:  # one adaptive model serves all shares
                values = {**healing, "method": method, "keep": keep, "seed": fold, "keep_also": [0.67]}
                if method != "apt":  # no feature maps
                    values |= {"features_weight": 0.0, "keep_also": []}
                jobs.append(("heal", method, keep, fold, load_recipe("heal", values)))
    for seed in range(seeds):
        kinds: list[tuple[str, dict[str, Any]]] = [("uniform", {"method": "uniform"})]
        kinds += [(name, {"method": name}) for name in ("random", "resize", "downscale")]
        kinds += [(f"apt, {scorer}", {"scorer": scorer}) for scorer in ("entropy", "glance")]
        kinds += [(f"apt, entropy, {init}", {"init": init}) for init in ("residual", "nonzero")]
        for name, values in kinds:
            for keep in (1.0,) if name == "uniform" else SHARES:
                recipe = load_recipe("short", {**LABELS, **values, "keep": keep, "seed": seed})
                jobs.append(("labels", name, keep, seed, recipe))
    return jobs


def _new_head_jobs(seeds: int) -> list[tuple[str, str, float, int, Recipe]]:
    """The recipe for new classes, on adaptive patches and uniform, beside the same updates by timm."""
    jobs = []
    for seed in range(seeds):
        for method, keep in (("apt", 0.5), *((f"{TIMM_LOOP}{rate:g}", 1.0) for rate in TIMM_RATES)):
            recipe = load_recipe("new-head", {**NEW_HEAD, "keep": keep, "seed": seed})
            jobs.append(("new-head", method, keep, seed, recipe))
    return jobs


def run(task: str, method: str, recipe: Recipe) -> list[TrainingRow]:
    """Train and evaluate, before and after."""
    if task == "new-head":
        return [_with_new_head(method, recipe)]
    aside = None
    if task == "labels":
        train, test = find_sources(DATA / "imagenette")
        host, truth = _with_ten_classes(), [test.load(i)[1] for i in range(len(test))]  # type: ignore[union-attr,arg-type]
    else:
        every = find_images([DATA / "imagenet_sample"])
        others = find_images([DATA / "coco_val64" / "images", DATA / "imagenette" / "train"])
        train, test = photos([*every[recipe.seed :: 2], *others]), photos(every[1 - recipe.seed :: 2])
        train, aside = hold_back(train, recipe.hold_back)
        with (DATA / "imagenet_sample" / "labels.csv").open(newline="") as lines:
            classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(lines)}
        host, truth = load_host(MODEL, CHECKPOINT), [classes[Path(test.name(i)).name] for i in range(len(test))]
    folder = Path(tempfile.mkdtemp())
    try:
        training = Training(recipe, host, train, aside, folder)
        training._prepare_shares()
        shares = training.shares.in_use
        before = {share: _scores(training, share, test, host, truth) for share in shares}  # type: ignore[arg-type]
        told = training.run()
        if not told["finished"]:
            raise SystemExit("stopped: the same command goes on with this row")
        after = {share: _scores(training, share, test, host, truth) for share in shares}  # type: ignore[arg-type]
    finally:
        shutil.rmtree(folder)
    speedup = None if told["speedup"] is None else told["speedup"]["median"]
    return [
        TrainingRow(
            task, method, share, recipe.seed, before[share], after[share], told["seconds"], speedup, told["updates"]
        )
        for share in shares
    ]


def _with_new_head(method: str, recipe: Recipe) -> TrainingRow:
    """Train the whole model with a new classifier for ten classes, by the recipe or by a loop of timm's parts."""
    train, test = find_sources(DATA / "imagenette")
    host = load_host(MODEL, CHECKPOINT)
    if method.startswith(TIMM_LOOP):
        return _timm_loop(method, recipe, host, train, test)  # type: ignore[arg-type]
    folder = Path(tempfile.mkdtemp())
    try:
        told = Training(recipe, host, train, test, folder).run()
    finally:
        shutil.rmtree(folder)
    before, after = ({"top1": told["evaluations"][i]["top1"]} for i in (0, -1))
    speedup = told["speedup"]["median"]
    values = before, after, told["seconds"], speedup, told["updates"]
    return TrainingRow("new-head", method, recipe.keep, recipe.seed, *values)


def _timm_loop(method: str, recipe: Recipe, host: Host, train: Source, test: Source) -> TrainingRow:
    """The values of the recipe in a loop that uses nothing of aptvit's training."""
    values: Any = recipe
    rate = float(method.removeprefix(TIMM_LOOP))
    vit: Any = host.model
    torch.manual_seed(recipe.seed)
    vit.reset_classifier(train.num_classes)
    options = {name: host.data[name] for name in ("input_size", "interpolation", "mean", "std")}
    augmented = create_transform(
        **options, is_training=True, scale=(values.crop, 1.0), hflip=values.flip, color_jitter=0.0
    )
    plain = create_transform(**options, crop_pct=host.data["crop_pct"])

    @torch.no_grad()
    def top1() -> float:
        vit.eval()
        rows = [(vit(plain(image)[None]).argmax().item(), label) for image, label in map(test.load, range(len(test)))]
        return mean(float(answer == label) for answer, label in rows)

    before, batches = top1(), torch.randperm(len(train)).split(recipe.batch_size)
    optimizer = create_optimizer_v2(
        vit, opt="adamw", lr=rate, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    warmup = round(recipe.warmup * len(batches))
    schedule, _ = create_scheduler_v2(
        optimizer,
        num_epochs=len(batches) - warmup,
        updates_per_epoch=1,
        step_on_epochs=False,
        warmup_epochs=warmup,
        warmup_lr=rate / (warmup + 1),
        warmup_prefix=True,
    )
    loss = LabelSmoothingCrossEntropy(values.label_smoothing)
    vit.train()
    start = time.perf_counter()
    for update, numbers in enumerate(batches):
        schedule.step_update(update)
        images, labels = zip(*map(train.load, numbers.tolist()), strict=True)
        loss(vit(torch.stack(list(map(augmented, images)))), torch.tensor(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    outcome = {"top1": before}, {"top1": top1()}, seconds, None, len(batches)
    return TrainingRow("new-head", method, 1.0, recipe.seed, *outcome)


def _with_ten_classes() -> Host:
    """The host with the ten rows of its classifier that the folders name."""
    host = load_host(MODEL, CHECKPOINT)
    vit: Any = host.model
    names = sorted(folder.name for folder in (DATA / "imagenette" / "train").iterdir())
    wnids = ImageNetInfo("imagenet-1k").label_names()
    rows = [wnids.index(name) for name in names]
    weight, bias = vit.head.weight.detach()[rows], vit.head.bias.detach()[rows]
    vit.reset_classifier(len(rows))
    with torch.no_grad():
        vit.head.weight.copy_(weight)
        vit.head.bias.copy_(bias)
    return host


@torch.no_grad()
def _scores(training: Training, share: float, test: Source, host: Host, truth: Sequence[int]) -> dict[str, float]:
    """Top-1, and agreement with the teacher if there is one."""
    model: Any = training.model
    model.eval()
    pictures = ImageDataset(test, host.data)
    normalise = DeviceAugmentation(host.data, None, 0, training.processes.device)
    numbers = [list(range(i, min(i + 25, len(test)))) for i in range(0, len(test), 25)]
    batches = [normalise.normalised(batch) for batch in make_loader(pictures, numbers, 0)]
    if training.recipe.blend:
        training.shares.calibrate(batches)  # so that all methods keep as much; no labels are needed
    training.shares.set(share)
    logits, expected = [], []
    for images in batches:
        logits.append(model(images).cpu())
        if training.task.teacher is not None:
            expected.append(training.task.teacher(images).logits.cpu())
    answers = torch.cat(logits)
    found = {"top1": float((answers.argmax(1) == torch.tensor(truth)).float().mean())}
    if expected:
        teacher = torch.cat(expected)
        found["uniform_top1"] = float((teacher.argmax(1) == torch.tensor(truth)).float().mean())
        found["agreement"] = float((answers.argmax(1) == teacher.argmax(1)).float().mean())
        divergence = (teacher.softmax(1) * (teacher.log_softmax(1) - answers.log_softmax(1))).sum(1).mean()
        found["divergence"] = float(divergence)
    if isinstance(model, AdaptivePatchTransformer):
        found["kept"] = sum(model.layout(images).keep_ratio * len(images) for images in batches) / len(test)
    return found


_HEALING = """\
ViT-Ti at 224 pixels; uniform {:.1f} % top-1. Recipe `heal` on 250 of 500 photos and 1,264 others (ten classes, and 64
of COCO), without labels, tested on the other 250; then the other way round; means over both halves, so no photo was
seen by the model that it tests. One adaptive model serves all its shares. Baselines have no feature maps to compare:
they learn from answers and pooled features."""

_LABELS = """\
ViT-Ti at 224 pixels on ten classes: 1,200 photos to train on, 400 to test, so one photo is 0.25 points and the sampling
error of a row about 1 point. The classifier is the ten rows of the checkpoint's. Mean over seeds, with standard
deviation."""

_NEW_HEAD = """\
ViT-Ti at 224 pixels with a new classifier for ten classes: 1,200 photos to train on, 400 to test. Recipe `new-head` in
one epoch, and a loop of timm's optimizer, schedule, transforms, loss and classifier as timm makes it, with the same
values except for the learning rate, of which three are tried: the recipe gives the new classifier ten times the rate of
the last block, the loop has one for both. Mean over seeds, with standard deviation."""

Group = list[TrainingRow]  # of one method and share


def as_markdown(record: TrainingRecord) -> str:
    """The tables."""
    heal, labels, new_head = (_grouped(record, task) for task in ("heal", "labels", "new-head"))
    uniform = {row.seed: row.before["uniform_top1"] for group in heal for row in group}.values()
    healed: Columns = (
        ("method", lambda rows: rows[0].method + ("" if len(rows) == 2 else ", one half only")),
        ("tokens", lambda rows: f"{rows[0].keep:.0%}"),
        ("before: top-1 / agreement / KL", lambda rows: _answers([row.before for row in rows])),
        ("after", lambda rows: _answers([row.after for row in rows])),
        ("training", _length),
    )
    labelled: Columns = (
        ("method", lambda rows: rows[0].method),
        ("tokens", lambda rows: f"{rows[0].keep:.0%}"),
        ("before: top-1", lambda rows: _spread([100 * row.before["top1"] for row in rows])),
        ("after", lambda rows: _spread([100 * row.after["top1"] for row in rows])),
        # The other seeds met more of what else ran on the machine.
        ("seconds of training, fastest seed", lambda rows: f"{min(row.seconds for row in rows):.0f}"),
        ("speed-up of a step", lambda rows: _mean([row.speedup for row in rows if row.speedup is not None]) or "1"),
    )
    return markdown_page(
        "Fine-tuning and healing",
        record.commands,
        record.environment,
        section("Healing without labels", _HEALING.format(100 * mean(uniform)) if heal else "", healed, heal),
        section("One epoch with labels", _LABELS, labelled, sorted(labels, key=lambda rows: -rows[0].keep)),
        section("A new classifier", _NEW_HEAD, _UPDATES, sorted(new_head, key=lambda rows: -rows[0].keep)),
    )


_UPDATES: Columns = (
    ("method", lambda rows: rows[0].method),
    ("tokens", lambda rows: f"{rows[0].keep:.0%}"),
    ("updates", lambda rows: str(rows[0].updates)),
    ("seeds", lambda rows: str(len(rows))),
    ("before: top-1", lambda rows: _spread([100 * row.before["top1"] for row in rows])),
    ("after", lambda rows: _spread([100 * row.after["top1"] for row in rows])),
)


def _grouped(record: TrainingRecord, task: str) -> list[Group]:
    """Rows of each share and method, from few tokens to many."""
    groups: dict[tuple[float, str], Group] = {}
    for row in sorted(record.measured, key=lambda row: (row.keep, row.method)):
        if row.task == task:
            groups.setdefault((row.keep, row.method), []).append(row)
    return list(groups.values())


def _answers(metrics: list[dict[str, float]]) -> str:
    top1, agreement, divergence = (mean(m[name] for m in metrics) for name in ("top1", "agreement", "divergence"))
    return f"{100 * top1:.1f} / {100 * agreement:.1f} / {divergence:.3f}"


def _length(rows: Group) -> str:
    updates = {row.updates for row in rows}
    if len(updates) == 1 and None not in updates:
        return f"{updates.pop()} updates"  # the clock did not decide
    return f"{mean(row.seconds for row in rows) / 60:.1f} minutes"


def _mean(values: list[float]) -> str:
    return f"{mean(values):.2f}" if values else ""


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__":
    main()
