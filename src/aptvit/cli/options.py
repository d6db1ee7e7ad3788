"""What the commands share: options with their one name, meaning and default, checks of what was typed, output.

Imports neither torch nor timm: a wrong path and a missing extra are found before they are imported.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from aptvit.calibration.calibrator import Target

T = TypeVar("T")

FAILED = 1
"""Exit code of a command that ran, and could not read some of its inputs or finish some of its work."""

BAD_INPUT = 2
"""Exit code of a command that did not run: a wrong value, path or option, or an extra that is not installed."""

INTERRUPTED = 130
"""Exit code of a command that was interrupted."""

MODEL = "vit_base_patch16_384"
KEEPS = "0.83,0.67,0.51"

Images = Annotated[list[Path], typer.Argument(help="Images, and folders of images.", metavar="IMAGES...")]
SomeImages = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Images, and folders of images; those that scikit-image and scikit-learn install by default.",
        metavar="[IMAGES...]",
    ),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Name of a timm model; in demo, embed and export also a folder that a training or save_pretrained wrote.",
        metavar="NAME",
    ),
]
Run = Annotated[Path | None, typer.Option("--run", help="Folder of a finished training.", metavar="FOLDER")]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights to load instead of timm's own.", metavar="FILE")
]
ImgSize = Annotated[
    int | None, typer.Option("--img-size", help="Side of the model's input in pixels; its own by default.", min=1)
]
Sizes = Annotated[
    str | None,
    typer.Option("--sizes", help="Sides of the input in pixels; the model's own by default.", metavar="224,384"),
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        help="Fraction of the patch tokens to keep; 0.5 by default, or what the recipe or the saved model says.",
        metavar="FRACTION",
    ),
]
Keeps = Annotated[str, typer.Option("--keeps", help="Fractions of the patch tokens to measure.", metavar="0.67,0.5")]
Thresholds = Annotated[
    str | None,
    typer.Option(
        "--thresholds",
        help="Instead of --keep: thresholds from fine to coarse, one for each size above the base patch.",
        metavar="5.5 4.0",
    ),
]
PerImage = Annotated[bool, typer.Option("--per-image", help="Every image keeps that fraction, not only their average.")]
Scales = Annotated[
    int | None,
    typer.Option(
        "--scales", help="Number of patch sizes, the base size included; 2, or as the thresholds say.", min=1, max=6
    ),
]
ScorerName = Literal["entropy", "laplacian", "upsample", "embedding", "glance"]
Scorer = Annotated[
    ScorerName,
    typer.Option(
        "--scorer", help="What scores the patches. glance is trained on the images first; export takes the first three."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="File that calibrate wrote, instead of --keep, --thresholds and the like.", metavar="FILE"
    ),
]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Type to compute in.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where to run: cpu, cuda, cuda:1; a GPU if there is one.", metavar="DEVICE"),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Images per batch; of an update on all processes together, in training. 8, or what the recipe says.",
        min=1,
    ),
]
Rounds = Annotated[
    int | None, typer.Option("--rounds", help="Timed rounds; 5 by default, in compare fewer for many images.", min=1)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the results; one named after the command by default.", metavar="FOLDER"),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="Name of the files, without ending; the device by default.", metavar="NAME"),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what the files hold already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and all else to standard error.")]

RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Name of a recipe, or a YAML file; the usual one by default.", metavar="NAME"),
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", help="Passes over the images; what the recipe says by default.", min=1)
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting of the recipe, as NAME=VALUE.", metavar="NAME=VALUE"),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings of the recipe that the task reads, and stop.")
]
Start = Annotated[
    Path | None,
    typer.Option("--start", help="Training to start from, usually that of the uniform model.", metavar="FOLDER"),
]
Method = Annotated[
    Literal["apt", "uniform", "resize"] | None,
    typer.Option("--method", help="resize has no sub-patch branch; what the recipe says by default."),
]
Size = Annotated[
    int | None,
    typer.Option("--size", help="Side of the training crops in pixels; what the recipe says by default.", min=32),
]


class NumbersAfterThresholds(typer.core.TyperCommand):
    """Lets ``--thresholds 5.5 4.0`` take all numbers that follow."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", arg) and "--thresholds" in (joined[-1:] + joined[-2:-1]):
                if joined[-1] == "--thresholds":
                    joined.append(arg)
                else:
                    joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


class Bars:
    """Progress bars on standard error, one for each piece of work."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, steps: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        return self._progress.track(steps, total=total, description=what)

    def counter(self, what: str, total: int, done: int) -> Callable[[int], None]:
        """A bar that moves by the number it is called with."""
        task = self._progress.add_task(what, total=total, completed=done)
        return lambda number: self._progress.advance(task, number)


# Checks, before torch is imported


def require(extra: str, *modules: str) -> None:
    """Raises ValueError if a module is not installed; the message names the extra."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install 'aptvit[{extra}]'")


def check_file(option: str, file: Path | None) -> None:
    """Raises ValueError if a file is named and not there."""
    if file is not None and not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"--{option} {file} {reason}: name a file")


def check_run(option: str, folder: Path | None) -> Path:
    """The folder of a training.

    Raises:
        ValueError: If none is named, or it holds no trained model.
    """
    if folder is None:
        raise ValueError(f"--{option} is missing: name the folder of a finished training")
    if not any((path / "config.json").is_file() for path in (folder, folder / "model")):
        reason = "holds no model" if folder.is_dir() else "does not exist"
        raise ValueError(f"--{option} {folder} {reason}: name the folder of a finished training")
    return folder


def check_data(data: str) -> None:
    """Raises ValueError if training data on this machine is not there, or needs an extra that is not."""
    if data.startswith("hf:"):
        require("data", "datasets")
    elif not data.endswith(".tar") and not Path(data).exists():
        raise ValueError(f"there is no folder {data}: `--help` says which folders are read")


def check_writable(folder: Path) -> None:
    """Raises ValueError if nothing can be written to a folder, which is made: before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".aptvit-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None


def checked_device(device: str | None) -> str:
    """The device to run on. Imports torch.

    Raises:
        ValueError: If it cannot be used.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device


# Values


def check_budget(
    thresholds: str | None = None,
    keep: float | None = None,
    per_image: bool = False,
    scales: int | None = None,
    config: Path | None = None,
) -> None:
    """Raises ValueError if options about the number of tokens contradict each other, or the file is not there."""
    check_file("config", config)
    as_numbers(thresholds, scales)
    named = {"thresholds": thresholds is not None, "keep": keep is not None, "config": config is not None}
    if config is not None or thresholds is not None:
        named["per-image"] = per_image
    if config is not None:
        named["scales"] = scales is not None
    chosen = [f"--{name}" for name, is_set in named.items() if is_set]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one, each decides what is merged")


def as_wish(
    thresholds: str | None = None, keep: float | None = None, per_image: bool = False, scales: int | None = None
) -> Target:
    """What --thresholds, --keep, --per-image and --scales say together. Imports torch."""
    from aptvit.calibration.calibrator import Target

    numbers = as_numbers(thresholds, scales)
    if numbers is not None:
        return Target(thresholds=numbers, scales=len(numbers) + 1)
    return Target(keep=0.5 if keep is None else keep, per_image=per_image, scales=scales or 2)


def as_numbers(thresholds: str | None, scales: int | None = None) -> tuple[float, ...] | None:
    """Thresholds as numbers.

    Raises:
        ValueError: If they are no numbers, or not as many as the scales need.
    """
    if thresholds is None:
        return None
    try:
        numbers = tuple(float(part) for part in thresholds.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--thresholds {thresholds}: give numbers, from fine to coarse, such as 5.5 4.0") from None
    if scales is not None and scales != len(numbers) + 1:
        raise ValueError(
            f"--thresholds {thresholds} with --scales {scales}: give one threshold for each size above the base patch"
        )
    return numbers


def as_list(option: str, words: str, kind: Callable[[str], T]) -> list[T]:
    """Values separated by commas or spaces, each once."""
    try:
        values = [kind(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--{option} {words}: give numbers, separated by commas") from None
    if not values:
        raise ValueError(f"--{option} is empty: give at least one value")
    return list(dict.fromkeys(values))


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["aptvit", *sys.argv[1:]])


# Output


def say(message: str, style: str | None = None) -> None:
    """A line on standard error."""
    Console(stderr=True).print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(value, indent=2))


def print_line(text: str) -> None:
    """A line on standard output that is not wrapped."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def finish(skipped: Sequence[str] = ()) -> None:
    """Say which inputs were left out, and end with the exit code that tells of them."""
    for message in skipped:
        say(f"skipped: {message}", "yellow")
    if skipped:
        raise typer.Exit(FAILED)
