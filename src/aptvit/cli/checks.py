"""Checks of what a command was given, before anything slow is imported: wrong paths and missing extras cost no time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from aptvit.calibration.calibrator import Target

T = TypeVar("T")


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


def is_chosen(context: typer.Context, name: str) -> bool:
    """Whether the command line names a parameter."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


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
    chosen = [name for name in context.params if is_chosen(context, name)]
    unused = [name for name in chosen if (name in excluded if excluded else name not in allowed)]
    if unused:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ValueError(f"{options}: not used with {mode}, leave out")


def is_saved(model: str) -> bool:
    """Whether the value of --model is the folder of an adaptive model, or of a finished training."""
    from aptvit.files.model_folders import SETTINGS_FILE, is_of_transformers

    if (Path(model) / SETTINGS_FILE).exists():  # a model around a ViT
        return True
    if is_of_transformers(Path(model)):
        return False
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


def as_texts(text: str | None) -> list[str]:
    """Parse texts separated by commas; none without the option.

    Raises:
        ValueError: If there are only commas.
    """
    if text is None:
        return []
    texts = [part.strip() for part in text.split(",") if part.strip()]
    if not texts:
        raise ValueError('--text is empty: give what to look for, such as "a cat,a dog"')
    return texts
