"""What the commands share: options, progress bars, and checks of what was typed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from aptvit.calibration.calibrator import Target

T = TypeVar("T")

ScorerName = Literal["entropy", "laplacian", "upsample", "embedding", "glance"]
Paths = Annotated[list[Path], typer.Argument(help="Images, and folders of images.", metavar="PHOTOS...")]
Thresholds = Annotated[
    str | None,
    typer.Option(help="Thresholds from fine to coarse, one for each size above the base patch.", metavar="5.5 4.0"),
]
Keep = Annotated[
    float | None,
    typer.Option(help="Share of the patch tokens to keep, 0.5 by default; thresholds are found on these photos."),
]
PerImage = Annotated[bool, typer.Option("--per-image", help="Give every photo that share, not only their average.")]
Scales = Annotated[int | None, typer.Option(help="Patch sizes, the base size included.", min=1, max=6)]
ScorerOption = Annotated[
    ScorerName, typer.Option(help="What decides where patches may be big; glance is taught on these photos first.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output, everything else to standard error.")
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

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, steps: Iterable[Any], what: str, total: int) -> Iterable[Any]:
        return self._progress.track(steps, total=total, description=what)


def as_wish(
    thresholds: str | None, keep: float | None, per_image: bool, scales: int | None, default_scales: int
) -> Target:
    from aptvit.calibration.calibrator import Target

    if thresholds is not None and (keep is not None or per_image):
        raise ValueError(f"--thresholds {thresholds} and --keep or --per-image: give one, each decides what is merged")
    numbers = as_numbers(thresholds)
    if numbers is None:
        return Target(keep=0.5 if keep is None else keep, per_image=per_image, scales=scales or default_scales)
    if scales is not None and scales != len(numbers) + 1:
        raise ValueError(
            f"--thresholds {thresholds} with --scales {scales}: give one threshold for each size above the base patch"
        )
    return Target(thresholds=numbers, scales=len(numbers) + 1)


def as_list(option: str, words: str, kind: Callable[[str], T]) -> list[T]:
    """Values separated by commas or spaces, each once."""
    try:
        values = [kind(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--{option} {words}: give numbers, separated by commas") from None
    if not values:
        raise ValueError(f"--{option} is empty: give at least one value")
    return list(dict.fromkeys(values))


def as_numbers(thresholds: str | None) -> tuple[float, ...] | None:
    if thresholds is None:
        return None
    try:
        return tuple(float(part) for part in thresholds.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--thresholds {thresholds}: give numbers, from fine to coarse, such as 5.5 4.0") from None


def check_writable(folder: Path) -> None:
    """Find out before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".aptvit-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from None


def checked_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device
