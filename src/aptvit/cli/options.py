"""Shared parts of the commands: options, checks of their values, and output.

A shared option has the same name, meaning and default in all commands. Imports neither torch nor timm, so wrong paths
and missing extras are reported before the slow imports.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aptvit.measuring.progress import ProgressLines

if TYPE_CHECKING:
    from aptvit.calibration.calibrator import Target

T = TypeVar("T")

FAILED = 1
"""Exit code of a command that ran, but could not read some inputs or finish some of the work."""

BAD_INPUT = 2
"""Exit code of a command that did not run, because of a wrong value, path or option, or a missing extra."""

INTERRUPTED = 130
"""Exit code of a command that was interrupted."""

MODEL = "vit_base_patch16_384"
KEEPS = "0.83,0.67,0.51"

ImagesArgument = Annotated[list[Path], typer.Argument(help="Images, and folders of images.", metavar="IMAGES...")]
OptionalImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Images, and folders of images; by default the photos that scikit-image and scikit-learn install.",
        metavar="[IMAGES...]",
    ),
]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Name of a timm model, or a folder that heal, finetune or save_pretrained wrote.",
        metavar="NAME",
    ),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Folder of a finished training.", metavar="FOLDER")]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="File with weights to load instead of timm's.", metavar="FILE")
]
ImgSizeOption = Annotated[
    int | None, typer.Option("--img-size", help="Side of the input in pixels; the model's own by default.", min=1)
]
SizesOption = Annotated[
    str | None,
    typer.Option("--sizes", help="Sides of the input in pixels; the model's own by default.", metavar="224,384"),
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        "--keep",
        help="Share of the patch tokens to keep; by default that of the recipe or of the saved model, else 0.5.",
        metavar="SHARE",
    ),
]
KeepsOption = Annotated[str, typer.Option("--keeps", help="Shares of the patch tokens to measure.", metavar="0.67,0.5")]
ThresholdsOption = Annotated[
    str | None,
    typer.Option(
        "--thresholds",
        help="Thresholds instead of --keep, from fine to coarse, one for each size above the base patch.",
        metavar="5.5 4.0",
    ),
]
PerImageOption = Annotated[
    bool, typer.Option("--per-image", help="Every image keeps the share of --keep, not only the average.")
]
ScalesOption = Annotated[
    int | None,
    typer.Option(
        "--scales",
        help="Number of patch sizes, the base size included; 2, or one more than the thresholds.",
        min=1,
        max=6,
    ),
]
ScorerName = Literal["entropy", "laplacian", "upsample", "embedding", "glance"]
ScorerOption = Annotated[
    ScorerName,
    typer.Option(
        "--scorer",
        help="How patches are scored. glance is trained on the images first; export has the first three only.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="File that calibrate wrote, instead of --keep, --thresholds and --scales.", metavar="FILE"
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Floating-point type to compute in.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="Device to run on: cpu, cuda, cuda:1; by default a GPU if there is one.", metavar="DEVICE"
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Images per batch; in training, per update of all processes. By default 8, or that of the recipe.",
        min=1,
    ),
]
RoundsOption = Annotated[
    int | None,
    typer.Option("--rounds", help="Number of timed rounds; by default 5, in compare fewer for many images.", min=1),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the results; by default the name of the command.", metavar="FOLDER"),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Name of the files, without suffix; by default the device.", metavar="NAME"),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Repeat measurements that are in the files already.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output, and all messages to standard error.")
]

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Name of a recipe, or a YAML file; by default the usual recipe of the command.", metavar="NAME"
    ),
]
TrainSplitOption = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Training split: a folder, file, list or shards, by itself or inside DATA, or the name of a split of a "
        "dataset of the hub. By default what names in DATA say.",
        metavar="SPLIT",
    ),
]
ValSplitOption = Annotated[
    str | None,
    typer.Option(
        "--val", help="Validation split to evaluate on, in the same way; else the test split.", metavar="SPLIT"
    ),
]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="Number of passes over the images; by default that of the recipe.", min=1)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the recipe; can be repeated.", metavar="NAME=VALUE"),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")]
AllowChangesOption = Annotated[
    bool,
    typer.Option(
        "--allow-changes",
        help="With --resume: continue also if recipe, model or data are not those of the checkpoint.",
    ),
]
PrintConfigOption = Annotated[bool, typer.Option("--print-config", help="Print all settings of the recipe, and stop.")]
StartOption = Annotated[
    Path | None,
    typer.Option("--start", help="Folder of a training to start from, usually of the uniform model.", metavar="FOLDER"),
]
MethodOption = Annotated[
    Literal["apt", "uniform", "resize"] | None,
    typer.Option(
        "--method", help="Method to train; resize is apt without the sub-patch branch. By default that of the recipe."
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option("--size", help="Side of the training crops in pixels; by default that of the recipe.", min=32),
]


class NumbersAfterThresholds(typer.core.TyperCommand):
    """A command in which ``--thresholds 5.5 4.0`` takes all numbers that follow."""

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


class ProgressBars:
    """Progress bars on standard error, one for each loop; a line in half a minute if it is no terminal.

    An instance is a `aptvit.measuring.progress.Progress`.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True)
        self._lines = None if console.is_terminal else ProgressLines(print_message)

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, steps: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        steps = steps if self._lines is None else self._lines(steps, description, total)
        return self._progress.track(steps, total=total, description=description)

    def counter(self, description: str, total: int, done: int) -> Callable[[int], None]:
        """Add a progress bar.

        Args:
            description: Text in front of the bar.
            total: Number of steps.
            done: Number of steps that are done already.

        Returns:
            A function that advances the bar by a number of steps.
        """
        task = self._progress.add_task(description, total=total, completed=done)
        write = None if self._lines is None else self._lines.counter(description, total, done)

        def advance(number: int) -> None:
            nonlocal done
            done += number
            self._progress.advance(task, number)
            if write is not None:
                write(done)

        return advance


# Checks, before torch is imported


def require(extra: str, *modules: str) -> None:
    """Check that modules are installed.

    Args:
        extra: Extra of aptvit that installs them, for the message.
        modules: Names of the modules.

    Raises:
        ValueError: If a module is not installed.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install 'aptvit[{extra}]'")


def check_file(option: str, file: Path | None) -> None:
    """Raise ValueError if the value of an option is a path, but not of an existing file."""
    if file is not None and not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"--{option} {file} {reason}: name a file")


def check_run(option: str, folder: Path | None) -> Path:
    """Check that the value of an option is the folder of a finished training.

    Args:
        option: Name of the option, for messages.
        folder: Value of the option.

    Returns:
        The folder.

    Raises:
        ValueError: If the option is missing, or the folder holds no trained model.
    """
    if folder is None:
        raise ValueError(f"--{option} is missing: name the folder of a finished training")
    if not any((path / "config.json").is_file() for path in (folder, folder / "model")):
        reason = "holds no model" if folder.is_dir() else "does not exist"
        raise ValueError(f"--{option} {folder} {reason}: name the folder of a finished training")
    return folder


def only_options(context: typer.Context, mode: str, *allowed: str, excluded: Sequence[str] = ()) -> None:
    """Check that the command line has no option that a mode of the command does not use.

    Args:
        context: Context of the command.
        mode: The mode, for the message.
        allowed: Names of the parameters that the mode uses.
        excluded: Names of parameters that it does not use, in place of ``allowed``.

    Raises:
        ValueError: If another option is set.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    chosen = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    unused = [name for name in chosen if (name in excluded if excluded else name not in allowed)]
    if unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ValueError(f"{options}: not used with {mode}, leave out")


def is_saved(model: str) -> bool:
    """Whether the value of --model is the folder of a saved model, or of a finished training."""
    return any((path / "config.json").is_file() for path in (Path(model), Path(model) / "model"))


def check_saved(model: str, options: Mapping[str, Any]) -> None:
    """Check that options that build a model are not combined with a saved model.

    Args:
        model: Folder of the model.
        options: Values of the options by name; None for those that are not set.

    Raises:
        ValueError: If an option is set.
    """
    chosen = [f"--{name}" for name, value in options.items() if value is not None]
    if chosen:
        raise ValueError(
            f"{model} is a saved model, with its own patch sizes and scorer: leave out {', '.join(chosen)}"
        )


def check_data(data: str | None, train: str | None = None, val: str | None = None) -> None:
    """Raise ValueError if local training data does not exist, or a dataset of the hub needs an extra not installed.

    Args:
        data: The dataset; None if ``train`` names all that is needed.
        train: Value of --train.
        val: Value of --val.
    """
    if data is None and train is None:
        raise ValueError("DATA is missing: name the dataset, or its splits with --train and --val")
    for place in (data, train, val):
        if place is None:
            continue
        if place.startswith("hf:"):
            require("data", "datasets")
            return
        inside = [] if place == data or data is None else [Path(data) / place]
        is_pattern = any(letter in place for letter in "*{")
        if not (is_pattern or any(path.exists() for path in (Path(place), *inside))):
            raise ValueError(f"{place} does not exist: --help lists the supported datasets")


def find_readable(paths: Sequence[Path]) -> list[Path]:
    """List the image files among files and folders, as `aptvit.files.images.find_images`.

    Args:
        paths: Files and folders.

    Raises:
        ValueError: If a path does not exist, there are no images, or none of them can be opened.
    """
    from aptvit.files.images import check_readable, find_images

    files = find_images(paths)
    check_readable(files)
    return files


def check_writable(folder: Path) -> None:
    """Create a folder, and raise ValueError if it cannot be written to: checked before the work instead of after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".aptvit-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None


def checked_device(device: str | None) -> str:
    """Choose the device to run on. Imports torch.

    Args:
        device: Value of --device; None for a GPU if there is one, else the CPU.

    Returns:
        Name of a torch device.

    Raises:
        ValueError: If the device cannot be used.
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
    """Raise ValueError if options that set the number of tokens contradict each other, or the file does not exist."""
    check_file("config", config)
    as_numbers(thresholds, scales)
    named = {"thresholds": thresholds is not None, "keep": keep is not None, "config": config is not None}
    if config is not None or thresholds is not None:
        named["per-image"] = per_image
    if config is not None:
        named["scales"] = scales is not None
    chosen = [f"--{name}" for name, is_set in named.items() if is_set]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one, each sets the number of tokens")


def as_target(
    thresholds: str | None = None, keep: float | None = None, per_image: bool = False, scales: int | None = None
) -> Target:
    """Combine --thresholds, --keep, --per-image and --scales. Imports torch."""
    from aptvit.calibration.calibrator import Target

    numbers = as_numbers(thresholds, scales)
    if numbers is not None:
        return Target(thresholds=numbers, scales=len(numbers) + 1)
    return Target(keep=0.5 if keep is None else keep, per_image=per_image, scales=scales or 2)


def as_numbers(thresholds: str | None, scales: int | None = None) -> tuple[float, ...] | None:
    """Parse the value of --thresholds: numbers separated by commas or spaces.

    Raises:
        ValueError: If a value is not a number, or the number of thresholds does not fit the scales.
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
    """Parse values separated by commas or spaces; duplicates are removed.

    Args:
        option: Name of the option, for messages.
        words: Value of the option.
        kind: Converts each value.

    Raises:
        ValueError: If a value cannot be converted, or there are none.
    """
    try:
        values = [kind(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--{option} {words}: give numbers, separated by commas") from None
    if not values:
        raise ValueError(f"--{option} is empty: give at least one value")
    return list(dict.fromkeys(values))


def command_line() -> str:
    """Return the command line of this process, quoted for a shell."""
    return shlex.join(["aptvit", *sys.argv[1:]])


# Output


def print_message(message: str, style: str | None = None) -> None:
    """Print a line to standard error."""
    Console(stderr=True).print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    print(json.dumps(value, indent=2))


def print_line(text: str) -> None:
    """Print a line to standard output, without wrapping it at the width of the terminal."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def finish(skipped: Sequence[str] = ()) -> None:
    """Print the reasons why inputs were skipped; if there are any, end the command with exit code `FAILED`."""
    for message in skipped:
        print_message(f"skipped: {message}", "yellow")
    if skipped:
        raise typer.Exit(FAILED)
