"""Which commands read files of a kind: each puts the hostile ones among good ones and returns a command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .case import Case, Payload
from .fixtures import class_folders, good_images, masks, voc

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

COMMANDS: dict[str, tuple[Command, ...]] = {"image": _READ_IMAGES}
