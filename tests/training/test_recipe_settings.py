"""A recipe has only settings that its task reads: small trainings record which settings they read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import shapes

from aptvit.hosts.pretrained import Host
from aptvit.training import (
    ClassificationRecipe,
    DetectionRecipe,
    DistillationRecipe,
    Recipe,
    SegmentationRecipe,
    Training,
)
from aptvit.training.run_folder import sources_of

COMMON = {
    "precision": "float32",
    "workers": 0,
    "batch_size": 4,
    "max_steps": 2,
    "keep": 0.6,
    "recalibrate": 1,
    "lr": 1e-3,
}
DENSE = {"size": 128, "channels": 16, "window": 4, "global_blocks": (1,)}


def watched(recipe: Recipe, read: set[str]) -> Recipe:
    """Return a recipe that adds the settings that are read to ``read``; not those that are only written to a file."""
    names, plain = {field.name for field in fields(recipe)}, copy.copy(recipe)

    class Watched(type(recipe)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                read.add(name)
            return super().__getattribute__(name)

        def to_yaml(self) -> str:
            return plain.to_yaml()

    object.__setattr__(recipe, "__class__", Watched)
    return recipe


def labelled_images(root: Path, folder: Path) -> str:
    return str(folder / "train")


def boxes(root: Path, folder: Path) -> str:
    shapes.boxes(root, 6, 0)
    shutil.rmtree(root / "ImageSets")  # without a validation split
    return str(root)


def masks(root: Path, folder: Path) -> str:
    return str(shapes.unsplit(root, 6))


@pytest.mark.parametrize(
    ("kind", "values", "make_data"),
    [
        (ClassificationRecipe, {"crop": 0.5}, labelled_images),
        (DistillationRecipe, {"crop": 0.5, "features_weight": 1.0, "pooled_weight": 1.0}, labelled_images),
        (DetectionRecipe, {**DENSE, "micro_batch_size": 2}, boxes),
        (SegmentationRecipe, DENSE, masks),
    ],
)
def test_each_setting_of_a_recipe_is_read_by_its_task(
    kind: Any, values: dict[str, Any], make_data: Callable[..., str], host: Host, folder: Path, tmp_path: Path
) -> None:
    read: set[str] = set()
    recipe = watched(kind(**{**COMMON, **values}), read)
    data = make_data(tmp_path / "data", folder)
    images, evaluation = sources_of(data, recipe)
    Training(recipe, host, images, evaluation, tmp_path / "run").run()
    assert read == {field.name for field in fields(kind)} - {"objective"}  # `load_recipe` reads this one
