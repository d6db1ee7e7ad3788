"""A training in its folder: start or continue it, and read its recipe, data and model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aptvit.api import load_model
from aptvit.datasets.find_boxes import find_boxes
from aptvit.datasets.find_masks import find_masks
from aptvit.datasets.find_sources import find_sources
from aptvit.datasets.sources import hold_back, photos, split_indices
from aptvit.datasets.splits import describe
from aptvit.files.text import printable, read_json
from aptvit.hosts.pretrained import class_names
from aptvit.storage.writing import write_json, write_text
from aptvit.training.recipe import load_recipe
from aptvit.training.recipes.common import Recipe
from aptvit.training.recipes.dense import DenseRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.trainer import Training

__all__ = ["is_run", "read_origin", "read_recipe", "report_problems", "sources_of", "train", "write_origin"]

_ORIGIN, _RECIPE = "run.json", "recipe.yaml"
_SHOWN = 10  # reasons why images or objects are left out that are shown


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training with its origin, see `write_origin`."""
    return (folder / _ORIGIN).is_file()


def write_origin(run: Path, recipe: Recipe, **origin: Any) -> None:
    """Write the origin of a training to its folder.

    Args:
        run: Folder of the training.
        recipe: Recipe of the training.
        origin: ``data``, ``train_split``, ``val_split``, ``model``, ``checkpoint`` and ``img_size``, see `train`; the
            names of the ``classes``; and ``changes``, what was changed when the training was continued.
    """
    write_json(run / _ORIGIN, origin)
    write_text(run / _RECIPE, recipe.to_yaml())


def read_origin(run: Path) -> dict[str, Any]:
    """Read the origin of a training that `write_origin` wrote, without the recipe.

    Raises:
        ValueError: If the file cannot be read, or is of no training.
    """
    file = run / _ORIGIN
    origin = read_json(file)
    if not isinstance(origin, dict) or not origin.keys() >= {"data", "model", "checkpoint", "img_size"}:
        raise ValueError(f"{printable(file)} tells no origin of a training: give the folder of a finished training")
    return origin


def read_recipe(run: Path) -> Recipe:
    """Read the recipe of a training from its folder, or from the folder ``model`` in it.

    Raises:
        ValueError: If the folder holds no recipe.
    """
    for file in (run / _RECIPE, run.parent / _RECIPE):  # also from model/ inside it
        if file.is_file():
            return load_recipe(file)
    raise ValueError(f"{run} is not the folder of a training: it holds no {_RECIPE}")


def sources_of(
    data: str | list[str] | None, recipe: Recipe, train_split: str | None = None, val_split: str | None = None
) -> tuple[Any, Any]:
    """Find the images of a training.

    Args:
        data: Folder, pattern or dataset, see `aptvit.training.find_sources`; for detection and segmentation a folder,
            see `aptvit.dense.find_boxes` and `find_masks`. Or a list of files and folders: images without labels; a
            single folder may have splits. None if ``train_split`` says all.
        recipe: Recipe of the task. Its fraction ``hold_back`` of the images is used for evaluation if the data has no
            evaluation split.
        train_split: Folder, file or list of the training split, instead of what names in the data say.
        val_split: The same for the evaluation split.

    Returns:
        Images to train on, and images to evaluate on or None.

    Raises:
        ValueError: If there are no images, or the task needs classes and there are none.
    """
    if isinstance(data, list):
        if len(data) > 1 or not Path(data[0]).is_dir():
            if train_split is not None or val_split is not None:
                raise ValueError("--train and --val name splits of one folder: give that folder alone")
            return hold_back(photos(data), recipe.hold_back)
        (data,) = data
    if isinstance(recipe, DenseRecipe):
        files, evaluation = _dense_files(data, recipe, train_split, val_split)
        if evaluation is None:
            kept, held_back = split_indices(len(files), recipe.hold_back)
            evaluation = files.only(held_back, f"{files.origin}, held back") if held_back else None
            files = files.only(kept)
        return files, evaluation
    is_labelled = not isinstance(recipe, DistillationRecipe)
    images, evaluation = find_sources(data, is_labelled, train_split, val_split)
    return (images, evaluation) if evaluation is not None else hold_back(images, recipe.hold_back)


def _dense_files(data: str | None, recipe: Recipe, train_split: str | None, val_split: str | None) -> tuple[Any, Any]:
    if isinstance(recipe, SegmentationRecipe):
        colours = recipe.colours or None
        return find_masks(data, None, recipe.ignore, recipe.subtract, train_split, val_split, colours)
    return find_boxes(data, train_split, val_split)


def _report_data(
    images: Any, evaluation: Any, out: Path, tell: Callable[[str], None], report: Callable[[str], None]
) -> None:
    """Tell what the data was taken for, and what was left out of it: the first reasons, and all of them in a file."""
    tell(describe(images, evaluation))
    problems = [*images.problems, *(() if evaluation is None else evaluation.problems)]
    file = out / "left-out.txt"
    if report_problems(problems, report, f", see {file}"):
        write_text(file, "".join(f"{problem}\n" for problem in problems))


def report_problems(problems: Sequence[str], report: Callable[[str], None], place: str = "") -> bool:
    """Report the first reasons why images or objects are left out, and how many more there are.

    Args:
        problems: All reasons.
        report: Called with each.
        place: Where all are listed.

    Returns:
        Whether there are more.
    """
    for problem in problems[:_SHOWN]:
        report(problem)
    more = len(problems) - _SHOWN
    if more > 0:
        report(f"{more} more{place}")
    return more > 0


def train(
    recipe: Recipe,
    data: str | list[str] | None,
    model: str,
    out: Path,
    *,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    start: Path | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    train_split: str | None = None,
    val_split: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
    report: Callable[[str], None] = lambda problem: None,
) -> dict[str, Any]:
    """Run a training in a folder, or continue it.

    Args:
        recipe: Recipe of the task.
        data: The images, see `sources_of`.
        model: Name of a timm model, or the folder of a saved model, which is trained further.
        out: Folder of the training.
        checkpoint: File with weights of the model, in place of timm's pretrained weights.
        img_size: Side of the input in pixels; by default the model's own.
        start: Folder of the training of a detector or segmenter to take weights from.
        resume: Continue from the newest checkpoint in the folder.
        allow_changes: Continue also if recipe, model or data are not those of the checkpoint; what differs is reported,
            and stored in the folder.
        train_split: As for `sources_of`.
        val_split: As for `sources_of`.
        tell: Called before the training, with a line about the images that it trains and evaluates on.
        report: Called before the training, with each reason why an image or a box is left out.

    Returns:
        Results, see `Training.run`.

    Raises:
        ValueError: If recipe, model and images do not fit together, or are not those of the checkpoint.
        ImportError: If a package that the training needs is not installed.
        WriteError: If the model cannot be written.
    """
    images, evaluation = sources_of(data, recipe, train_split, val_split)
    training = Training(recipe, load_model(model, checkpoint, img_size), images, evaluation, out, start)
    with training.processes.only_writers(out):
        changes = training.find_checkpoint(allow_changes) if resume else []
        if training.processes.is_first:
            out.mkdir(parents=True, exist_ok=True)
            _report_data(images, evaluation, out, tell, report)
            file = None if checkpoint is None else str(checkpoint.resolve())
            if isinstance(data, str) and not data.startswith("hf:"):
                data = str(Path(data).resolve())
            model = str(Path(model).resolve()) if Path(model).is_dir() else model
            classes = list(training.task.classes) or class_names(training.model)
            origin: dict[str, Any] = {"model": model, "checkpoint": file, "img_size": img_size, "classes": classes}
            splits = {"train_split": _absolute(train_split), "val_split": _absolute(val_split)}
            if changes:
                tell(f"changed since {training.updates_before} updates: {'; '.join(changes)}")
                origin["changes"] = [*_changes(out), {"updates": training.updates_before, "changes": changes}]
            elif resume and _changes(out):
                origin["changes"] = _changes(out)
            write_origin(out, training.recipe, data=data, **splits, **origin)
        return training.run(resume)


def _changes(run: Path) -> list[dict[str, Any]]:
    """What was changed when a training was continued, so far."""
    changes: list[dict[str, Any]] = read_origin(run).get("changes", []) if is_run(run) else []
    return changes


def _absolute(split: str | None) -> str | None:
    """A path that holds from any folder; names of splits and patterns inside the data stay."""
    return split if split is None or not Path(split).exists() else str(Path(split).resolve())
