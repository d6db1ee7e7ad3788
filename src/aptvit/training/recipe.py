"""Recipes by name or from a file: which class reads them, and what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.common import Recipe
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.recipes.segmentation import SegmentationRecipe

__all__ = ["RECIPES", "Recipe", "default_dense_recipe", "load_recipe"]

RECIPES = (
    *("full", "short", "adapters", "distill", "heal"),
    *("detector", "detector-short", "detector-heal", "detector-choose"),
    *("segmenter", "segmenter-short", "segmenter-heal", "segmenter-choose"),
)

_CLASSES: dict[str, type[Recipe]] = {
    "labels": ClassificationRecipe,
    "distill": DistillationRecipe,
    "boxes": DetectionRecipe,
    "pixels": SegmentationRecipe,
}
"""Class of a recipe by its ``objective``."""

_OF_ALL_TASKS = {"label_smoothing", "temperature", "cascade", "distort"}
"""No task reads all of these. A file that has them lists the settings of all tasks, as files of 0.1 did."""


def load_recipe(name_or_file: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """A recipe by name or from a YAML file, with some settings replaced.

    Args:
        name_or_file: One of `RECIPES`, or a file; what it leaves out has the default. Its ``objective`` names the task:
            ``labels``, ``distill``, ``boxes`` or ``pixels``. Files of 0.1 list the settings of all tasks: those of
            other tasks are left out.
        overrides: Settings by name, or strings ``name=value`` with values as YAML has them.

    Returns:
        A recipe of the task: `ClassificationRecipe`, `DistillationRecipe`, `DetectionRecipe` or `SegmentationRecipe`.

    Raises:
        ValueError: If there is no such recipe, the task has no such setting, or a value is not what it must be.
    """
    values = _read(name_or_file)
    changes = dict(overrides) if isinstance(overrides, Mapping) else dict(map(_parse, overrides))
    objective = {**values, **changes}.get("objective", "labels")
    if objective not in _CLASSES:
        raise ValueError(f"objective={objective!r} must be {' or '.join(map(repr, _CLASSES))}")
    kind = _CLASSES[objective]
    if values.keys() >= _OF_ALL_TASKS:
        foreign = {name for other in _CLASSES.values() for name in _types(other)} - _types(kind).keys()
        values = {name: value for name, value in values.items() if name not in foreign}
    return kind(**{name: _as_type(kind, name, value) for name, value in {**values, **changes}.items()})


def default_dense_recipe(task: str, has_start: bool, method: str | None) -> str:
    """Name of the recipe that suits a detector or a segmenter.

    What heals a detector does nothing for a segmenter, for which only the choice of patches is trained.

    Args:
        task: "detector" or "segmenter".
        has_start: Whether there is a trained one to start from.
        method: That the recipe's own is replaced with, if any.
    """
    if not has_start:
        return task
    if method == "uniform":
        return f"{task}-short"
    return "detector-heal" if task == "detector" else "segmenter-choose"


def _read(name_or_file: str | Path) -> dict[str, Any]:
    """Settings that a published recipe, or a file, has."""
    path = Path(name_or_file)
    if str(name_or_file) in RECIPES:
        text = (resources.files("aptvit.training") / "recipes" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"there is no recipe {str(name_or_file)!r}: use {', '.join(RECIPES)}, or a YAML file")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, such as 'epochs: 1'")
    return values


def _parse(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} must be NAME=VALUE, such as epochs=3")
    return name.strip().replace("-", "_"), yaml.safe_load(value) if value.strip() else ""


def _types(kind: type[Recipe]) -> dict[str, Any]:
    """Type of each setting of a task."""
    types = get_type_hints(kind)
    return {field.name: types[field.name] for field in fields(kind)}


def _as_type(kind: type[Recipe], name: str, value: Any) -> Any:
    """A value of the type that the setting has."""
    types = _types(kind)
    if name not in types:
        raise ValueError(_unknown(kind, name, list(types)))
    wanted = types[name]
    try:
        if get_origin(wanted) is tuple:
            words = value.replace(",", " ").split() if isinstance(value, str) else value
            return tuple(map(get_args(wanted)[0], [words] if isinstance(words, (int, float)) else words))
        if get_origin(wanted) is Literal:
            if value not in get_args(wanted):
                raise ValueError
            return value
        if wanted is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if wanted is int and float(value) != int(float(value)):
            raise ValueError
        return wanted(float(value)) if wanted in (int, float) else wanted(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be {_in_words(wanted)}") from None


def _in_words(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(wanted, "numbers")


def _unknown(kind: type[Recipe], name: str, names: list[str]) -> str:
    others = [other.task for other in _CLASSES.values() if name in _types(other)]
    (nearest,) = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    owner = f", which is of {' and '.join(others)}" if others else ""
    return f"a {kind.task} recipe has no setting {name!r}{owner}: did you mean {nearest!r}?"
