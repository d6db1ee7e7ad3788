"""Load recipes by name or from a file: choose the class for the task, and check names and types of the settings."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from aptvit.files.text import printable, read_yaml
from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.common import Recipe
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe

__all__ = ["RECIPES", "Recipe", "default_dense_recipe", "load_recipe"]

RECIPES = (
    *("new-head", "short", "full", "adapters", "distill", "heal"),
    *("detector", "detector-short", "detector-heal", "detector-choose"),
    *("segmenter", "segmenter-short", "segmenter-heal", "segmenter-choose"),
)

_CLASSES: dict[str, type[Recipe]] = {
    "labels": ClassificationRecipe,
    "distill": DistillationRecipe,
    "boxes": DetectionRecipe,
    "pixels": SegmentationRecipe,
}
"""Class of a recipe by the setting ``objective``."""

_OLD_FILE_SETTINGS = {"label_smoothing", "temperature", "cascade", "distort"}
"""Settings of different tasks. Only files of version 0.1, which have the settings of all tasks, have all of these."""


def load_recipe(name_or_file: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """Load a recipe by name or from a YAML file, and replace settings.

    Args:
        name_or_file: A name in `RECIPES`, or a file. Settings that are missing in the file have the defaults. The
            setting ``objective`` names the task: ``labels``, ``distill``, ``boxes`` or ``pixels``. Files of version 0.1
            have the settings of all tasks; those of other tasks are ignored.
        overrides: Settings by name, or strings ``name=value`` with values in YAML.

    Returns:
        A recipe of the task: `ClassificationRecipe`, `DistillationRecipe`, `DetectionRecipe` or `SegmentationRecipe`.

    Raises:
        ValueError: If the recipe does not exist, the task has no such setting, or a value has the wrong type or range.
    """
    values = _read(name_or_file)
    changes = dict(overrides) if isinstance(overrides, Mapping) else dict(map(_parse, overrides))
    objective = {**values, **changes}.get("objective", "labels")
    if objective not in _CLASSES:
        raise ValueError(f"objective={objective!r} must be {' or '.join(map(repr, _CLASSES))}")
    kind = _CLASSES[objective]
    if values.keys() >= _OLD_FILE_SETTINGS:
        foreign = {name for other in _CLASSES.values() for name in _types(other)} - _types(kind).keys()
        values = {name: value for name, value in values.items() if name not in foreign}
    return kind(**{name: _as_type(kind, name, value) for name, value in {**values, **changes}.items()})


def default_dense_recipe(task: str, has_start: bool, method: str | None) -> str:
    """Return the name of the default recipe of a detector or a segmenter.

    From a trained uniform network the default is to heal a detector; for a segmenter only the selection of patches is
    trained, because healing does not improve it.

    Args:
        task: "detector" or "segmenter".
        has_start: Whether the training starts from a trained network.
        method: The method that is set in place of the recipe's, or None.
    """
    if not has_start:
        return task
    if method == "uniform":
        return f"{task}-short"
    return "detector-heal" if task == "detector" else "segmenter-choose"


def _read(name_or_file: str | Path) -> dict[str, Any]:
    """Read the settings in a published recipe or a file."""
    if str(name_or_file) in RECIPES:
        with resources.as_file(resources.files("aptvit.training") / "recipes" / f"{name_or_file}.yaml") as file:
            return read_yaml(file)
    if Path(name_or_file).is_file():
        return read_yaml(Path(name_or_file))
    raise ValueError(f"there is no recipe {printable(name_or_file)!r}: use {', '.join(RECIPES)}, or a YAML file")


def _parse(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} must be NAME=VALUE, such as epochs=3")
    try:
        return name.strip().replace("-", "_"), yaml.safe_load(value) if value.strip() else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{word[:100]!r} has no value in YAML: {' '.join(str(error).split())}") from None


def _types(kind: type[Recipe]) -> dict[str, Any]:
    """Type of each setting of a recipe class."""
    types = get_type_hints(kind)
    return {field.name: types[field.name] for field in fields(kind)}


def _as_type(kind: type[Recipe], name: str, value: Any) -> Any:
    """Convert a value to the type of the setting."""
    types = _types(kind)
    if name not in types:
        raise ValueError(_unknown(kind, name, list(types)))
    target = types[name]
    try:
        if get_origin(target) is tuple:
            words = value.replace(",", " ").split() if isinstance(value, str) else value
            kind_of_part = get_args(target)[0]
            return tuple(
                _as_number(kind_of_part, word) for word in ([words] if isinstance(words, (int, float)) else words)
            )
        if get_origin(target) is Literal:
            if value not in get_args(target):
                raise ValueError
            return value
        if target is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        return _as_number(target, value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={repr(value)[:100]} must be {_in_words(target)}") from None


def _as_number(target: Any, value: Any) -> Any:
    """Convert to a finite number; to another type, if that is no number."""
    if target not in (int, float):
        if isinstance(value, (list, dict)):
            raise ValueError
        return target(value)
    if not math.isfinite(number := float(value)) or (target is int and number != int(number)):
        raise ValueError
    return target(number)


def _in_words(target: Any) -> str:
    if get_origin(target) is Literal:
        return " or ".join(map(repr, get_args(target)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(target, "numbers")


def _unknown(kind: type[Recipe], name: str, names: list[str]) -> str:
    tasks = [other.task for other in _CLASSES.values() if name in _types(other)]
    (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    owner = f", which is a setting of {' and '.join(tasks)}" if tasks else ""
    return f"a {kind.task} recipe has no setting {name!r}{owner}: did you mean {nearest!r}?"
