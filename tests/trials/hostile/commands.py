"""Which commands read files of a kind: each puts the hostile ones among good ones and returns a command line."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..fixtures import class_folders, coco, good_images, masks, voc, yolo
from .case import Case, Payload
from .clips import video
from .images import encode

__all__ = ["COMMANDS", "Command", "Place"]


@dataclass(frozen=True)
class Place:
    """Where a command is tried.

    Attributes:
        folder: Working folder, empty.
        models: Folder of `fixtures.make_models`, which is not changed.
        payload: What attacks aim at.
    """

    folder: Path
    models: Path
    payload: Payload

    def put(self, cases: Sequence[Case], *folder: str) -> Path:
        """Write hostile files into a folder in the working folder; numbered if there are several."""
        place = self.folder.joinpath(*folder)
        place.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(cases):
            file = case.file if len(cases) == 1 else f"{number:02d} {case.file}"[-250:]
            case.make(place / file, self.payload)
        return place


@dataclass(frozen=True)
class Command:
    """A command that reads files of a kind.

    Attributes:
        name: Name of the command, and what of it.
        words: Writes the hostile files and good ones beside them, and returns the command line.
        together: Number of hostile files that are given at once; more than 1 where the command takes long.
        reports_all: Whether it reports on each good image by name.
    """

    name: str
    words: Callable[[Place, Sequence[Case]], list[str]]
    together: int = 1
    reports_all: bool = False


def _model(place: Place) -> list[str]:
    return ["--model", str(place.models / "model"), "--device", "cpu", "--out", "out"]


def _folder(place: Place, cases: Sequence[Case]) -> str:
    good_images(place.folder / "data")
    place.put(cases, "data")
    return "data"


def _show(place: Place, cases: Sequence[Case]) -> list[str]:
    return ["show", _folder(place, cases), "--longer-side", "64", "--out", "out"]


def _compare(place: Place, cases: Sequence[Case]) -> list[str]:
    return ["compare", _folder(place, cases), "--rounds", "1", *_model(place)]


def _calibrate(place: Place, cases: Sequence[Case]) -> list[str]:
    return ["calibrate", _folder(place, cases), *_model(place)]


def _evaluate(place: Place, cases: Sequence[Case]) -> list[str]:
    options = ["--methods", "downscale", "--keeps", "0.5", "--rounds", "1", "--timed-images", "2"]
    return ["evaluate", _folder(place, cases), *options, *_model(place)]


def _embed(place: Place, cases: Sequence[Case]) -> list[str]:
    return ["embed", _folder(place, cases), *_model(place)]


def _find(command: str, task: str) -> Callable[[Place, Sequence[Case]], list[str]]:
    def words(place: Place, cases: Sequence[Case]) -> list[str]:
        run = str(place.models / task)
        return [command, _folder(place, cases), "--run", run, "--max-side", "64", "--device", "cpu", "--out", "out"]

    return words


def _benchmark(place: Place, cases: Sequence[Case]) -> list[str]:
    model = ["--models", str(place.models / "model"), "--device", "cpu", "--out", "out"]
    return ["benchmark", _folder(place, cases), "--keeps", "0.5", "--batch-sizes", "2", "--rounds", "1", *model]


def _export(place: Place, cases: Sequence[Case]) -> list[str]:
    model = ["--model", "test_vit", "--checkpoint", str(place.models / "weights.safetensors"), "--out", "out"]
    return ["export", _folder(place, cases), "--format", "torch-export", *model]


def _training(place: Place, *settings: str) -> list[str]:
    values = ("precision=float32", "workers=0", "batch_size=4", "max_steps=2", "lr=1e-4", *settings)
    words = [word for value in values for word in ("--set", value)]
    return ["--model", str(place.models / "model"), "--out", "out", *words]


_DENSE = ("size=64", "channels=16", "hold_back=0")


def _heal(place: Place, cases: Sequence[Case]) -> list[str]:
    return ["heal", _folder(place, cases), *_training(place)]


def _finetune(place: Place, cases: Sequence[Case]) -> list[str]:
    class_folders(place.folder / "data")
    place.put(cases, "data", "cat")
    return ["finetune", "data", *_training(place)]


def _train_detector(place: Place, cases: Sequence[Case]) -> list[str]:
    images = place.put(cases, "data", "JPEGImages")
    voc(place.folder / "data", tuple(path.stem for path in images.iterdir()))
    return ["train-detector", "data", "--method", "apt", *_training(place, *_DENSE)]


def _train_segmenter(place: Place, cases: Sequence[Case]) -> list[str]:
    images = place.put(cases, "data", "images")
    names = [path.stem for path in images.iterdir()]
    masks(place.folder / "data")
    for name in names:
        shutil.copy(place.folder / "data" / "masks" / "good0.png", place.folder / "data" / "masks" / f"{name}.png")
    return ["train-segmenter", "data", "--method", "apt", *_training(place, *_DENSE)]


_READ_IMAGES = (
    Command("show", _show, together=3, reports_all=True),
    Command("compare", _compare, together=10),
    Command("calibrate", _calibrate, together=10),
    Command("evaluate", _evaluate, together=10),
    Command("embed", _embed, together=3, reports_all=True),
    Command("detect", _find("detect", "detector"), together=10, reports_all=True),
    Command("segment", _find("segment", "segmenter"), together=10, reports_all=True),
    Command("benchmark", _benchmark, together=40),
    Command("export", _export, together=40),
    Command("heal", _heal, together=20),
    Command("finetune", _finetune, together=20),
    Command("train-detector", _train_detector, together=20),
    Command("train-segmenter", _train_segmenter, together=20),
)


# Models, checkpoints, settings


def _with_model(name: str, words: Callable[[Place, str], list[str]], kind: str = "model") -> Command:
    """A command that is given a hostile model."""

    def prepare(place: Place, cases: Sequence[Case]) -> list[str]:
        good_images(place.folder / "data")
        class_folders(place.folder / "classes")
        shutil.copytree(place.models / kind, place.folder / "hostile")
        for case in cases:
            case.make(place.folder / "hostile", place.payload)
        return words(place, "hostile")

    return Command(f"{name} of a {kind}", prepare)


def _host_of(place: Place) -> list[str]:
    return ["--model", "test_vit", "--checkpoint", str(place.models / "weights.safetensors")]


_ON_CPU = ["--device", "cpu", "--out", "out"]
_EVALUATE = ["--methods", "downscale", "--keeps", "0.5", "--rounds", "1", "--timed-images", "2"]
_BENCHMARK = ["--keeps", "0.5", "--batch-sizes", "2", "--rounds", "1"]
_CALIBRATED = ["--device", "cpu", "--out", "out/model"]
_EXPORT = ["--format", "torch-export", "--out", "out"]


def _settings(*further: str) -> list[str]:
    values = ("precision=float32", "workers=0", "batch_size=4", "max_steps=2", "lr=1e-4", *further)
    return [word for value in values for word in ("--set", value)]


_READ_MODELS = (
    _with_model("compare", lambda place, model: ["compare", "data", "--rounds", "1", "--model", model, *_ON_CPU]),
    _with_model("calibrate", lambda place, model: ["calibrate", "data", "--model", model, *_ON_CPU]),
    _with_model("evaluate", lambda place, model: ["evaluate", "data", *_EVALUATE, "--model", model, *_ON_CPU]),
    _with_model("benchmark", lambda place, model: ["benchmark", "data", *_BENCHMARK, "--models", model, *_ON_CPU]),
    _with_model("embed", lambda place, model: ["embed", "data", "--model", model, *_ON_CPU]),
    _with_model("export", lambda place, model: ["export", "data", "--model", model, *_EXPORT]),
    _with_model("heal", lambda place, model: ["heal", "data", "--model", model, "--out", "out", *_settings()]),
    _with_model(
        "finetune", lambda place, model: ["finetune", "classes", "--model", model, "--out", "out", *_settings()]
    ),
)


def _of_checkpoint(name: str, *words: str) -> Command:
    def prepare(place: Place, cases: Sequence[Case]) -> list[str]:
        good_images(place.folder / "data")
        class_folders(place.folder / "classes")
        shutil.copy(place.models / "weights.safetensors", place.folder / "hostile.safetensors")
        for case in cases:
            case.make(place.folder / case.file, place.payload)
        file = cases[0].file if cases else "hostile.safetensors"
        return [name, *words, "--model", "test_vit", "--checkpoint", file, "--out", "out"]

    return Command(f"{name} of a checkpoint", prepare)


_READ_CHECKPOINTS = (
    _of_checkpoint("compare", "data", "--rounds", "1"),
    _of_checkpoint("calibrate", "data"),
    _of_checkpoint("evaluate", "data", *_EVALUATE),
    _of_checkpoint("embed", "data"),
    _of_checkpoint("export", "data", "--format", "torch-export"),
    _of_checkpoint("heal", "data", *_settings()),
    _of_checkpoint(
        "finetune", "classes", "--recipe", "new-head", *_settings(), "--set", "max_steps=0", "--epochs", "20"
    ),
)


def _of_file(name: str, prepare: Callable[[Path], object], folder: str, *words: str) -> Command:
    """A command that is given a folder of good files with a hostile one in it, or the hostile file itself.

    Args:
        name: Name of the command, and what of it.
        prepare: Writes the good files into the folder ``data``.
        folder: Where the hostile file goes.
        words: The command line; MODELS stands for the folder of models.
    """

    def arranged(place: Place, cases: Sequence[Case]) -> list[str]:
        prepare(place.folder / "data")
        for case in cases:
            path = place.folder / folder / case.file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                path.unlink()
            case.make(path, place.payload)
        return [word.replace("MODELS", str(place.models)) for word in words]

    return Command(name, arranged)


def _good_list(folder: Path) -> None:
    good_images(folder)
    (folder.parent / "hostile.txt").write_text("data/good0.png\n")


def _good_configuration(folder: Path) -> None:
    good_images(folder)
    text = '{"architecture": "test_vit", "size": 64, "aptvit": {"keep": 0.5}}'
    (folder.parent / "hostile.json").write_text(text)


def _good_recipe(folder: Path) -> None:
    class_folders(folder)
    (folder.parent / "hostile.yaml").write_text("epochs: 1\n")


def _good_labels(folder: Path) -> None:
    good_images(folder)
    (folder / "hostile.csv").write_text("file,class_index\ngood0.png,0\ngood1.png,1\ngood2.png,1\n")


def _good_shard(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "good.tar", "w") as tar:
        for key in ("a", "b"):
            for suffix, content in (("png", encode("png")), ("cls", b"0")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _good_state(folder: Path) -> None:
    class_folders(folder)


def _voc_with_hostile(folder: Path) -> None:
    voc(folder, ("hostile",))
    shutil.copy(folder / "JPEGImages" / "good0.png", folder / "JPEGImages" / "hostile.png")


def _masks_with_hostile(folder: Path) -> None:
    masks(folder)
    shutil.copy(folder / "images" / "good0.png", folder / "images" / "hostile.png")


def _good_clip(folder: Path) -> None:
    folder.mkdir()
    (folder / "hostile.mp4").write_bytes(video())


_OUT = ("--model", "MODELS/model", "--out", "out")
_WEIGHTS = ("--model", "test_vit", "--checkpoint", "MODELS/weights.safetensors", "--out", "out")
_DENSE_TRAINING = ("--method", "apt", *_OUT, *_settings(*_DENSE))
_OF_DETECTOR = ("--task", "detection", "--run", "MODELS/detector", "--rounds", "1", "--out", "out")
_OF_SEGMENTER = ("--task", "segmentation", "--run", "MODELS/segmenter", "--rounds", "1", "--out", "out")


def _train_and_evaluate(kind: str, prepare: Callable[[Path], object], folder: str, data: str) -> tuple[Command, ...]:
    masks_of = ("--masks",) if kind == "coco" else ()
    task = "segmenter" if kind == "mask" else "detector"
    options = _OF_SEGMENTER if kind == "mask" else _OF_DETECTOR
    return (
        _of_file(f"train-{task} on {kind}", prepare, folder, f"train-{task}", data, *masks_of, *_DENSE_TRAINING),
        _of_file(f"evaluate on {kind}", prepare, folder, "evaluate", data, *options),
    )


_RUN = ("--out", "out", "--size", "64", *_settings("channels=16", "hold_back=0"))


def _train_from(kind: str, data: Callable[[Path], object]) -> Command:
    """A training that starts from a hostile detector or segmenter."""

    def words(place: Place, run: str) -> list[str]:
        return [f"train-{kind}", str(data(place.folder / "annotated")), "--start", run, *_host_of(place), *_RUN]

    return _with_model(f"train-{kind}", words, kind)


COMMANDS: dict[str, tuple[Command, ...]] = {
    "image": _READ_IMAGES,
    "model": _READ_MODELS,
    "depth": (
        _with_model(
            "compare", lambda place, model: ["compare", "data", "--rounds", "1", "--model", model, *_ON_CPU], "depth"
        ),
        _with_model("calibrate", lambda place, model: ["calibrate", "data", "--model", model, *_CALIBRATED], "depth"),
    ),
    "detector": (
        _with_model("detect", lambda place, run: ["detect", "data", "--run", run, *_ON_CPU], "detector"),
        _train_from("detector", voc),
        _with_model(
            "evaluate",
            lambda place, run: [
                "evaluate",
                str(voc(place.folder / "voc")),
                "--task",
                "detection",
                "--run",
                run,
                *_ON_CPU,
            ],
            "detector",
        ),
    ),
    "segmenter": (
        _with_model("segment", lambda place, run: ["segment", "data", "--run", run, *_ON_CPU], "segmenter"),
        _train_from("segmenter", masks),
    ),
    "checkpoint": _READ_CHECKPOINTS,
    "configuration": (
        _of_file(
            "compare of a configuration",
            _good_configuration,
            ".",
            "compare",
            "data",
            "--config",
            "hostile.json",
            "--rounds",
            "1",
            *_WEIGHTS,
        ),
        _of_file(
            "embed of a configuration", _good_configuration, ".", "embed", "data", "--config", "hostile.json", *_WEIGHTS
        ),
    ),
    "recipe": (
        _of_file(
            "finetune by a recipe",
            _good_recipe,
            ".",
            "finetune",
            "data",
            "--recipe",
            "hostile.yaml",
            *_OUT,
            "--set",
            "workers=0",
            "--set",
            "batch_size=4",
            "--set",
            "max_steps=2",
        ),
        _of_file(
            "train-detector by a recipe",
            _good_recipe,
            ".",
            "train-detector",
            "data",
            "--recipe",
            "hostile.yaml",
            "--print-config",
        ),
    ),
    "state": (
        _of_file(
            "finetune from a checkpoint",
            _good_state,
            "out/checkpoints/00000001",
            "finetune",
            "data",
            "--resume",
            *_OUT,
            *_settings(),
        ),
    ),
    "shard": (
        _of_file("embed of shards", _good_shard, "data", "embed", "data", *_OUT),
        _of_file("finetune on shards", _good_shard, "data", "finetune", "data", *_OUT, *_settings()),
    ),
    "table": (_of_file("embed of tables", good_images, "data", "embed", "data", *_OUT),),
    "list": (_of_file("embed of a list", _good_list, ".", "embed", "hostile.txt", *_OUT),),
    "coco": _train_and_evaluate("coco", coco, "data", "data"),
    "voc": _train_and_evaluate("voc", _voc_with_hostile, "data/Annotations", "data"),
    "yolo": _train_and_evaluate("yolo", yolo, "data", "data"),
    "mask": _train_and_evaluate("mask", _masks_with_hostile, "data", "data"),
    "labels": (
        _of_file("evaluate by labels", _good_labels, "data", "evaluate", "data/hostile.csv", *_EVALUATE, *_OUT),
        _of_file(
            "compare by labels",
            _good_labels,
            "data",
            "compare",
            "data",
            "--labels",
            "data/hostile.csv",
            "--rounds",
            "1",
            *_OUT,
        ),
    ),
    "clip": (
        _of_file(
            "compare of clips",
            _good_clip,
            "data",
            "compare",
            "data/hostile.mp4",
            "--video",
            "--frames",
            "4",
            "--tolerance",
            "2",
            "--rounds",
            "1",
            *_WEIGHTS[:-2],
        ),
    ),
}
