"""Recipes: a class for each task, published values, files of version 0.1, and errors."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from aptvit.training import (
    RECIPES,
    ClassificationRecipe,
    DetectionRecipe,
    DistillationRecipe,
    Recipe,
    SegmentationRecipe,
    load_recipe,
)

SINCE_0_1 = {"colours", "reading"}
OF_0_1: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "recipes_of_0_1.json").read_text())
"""Files that version 0.1 wrote for each recipe, with the settings of all tasks."""

TASKS = {
    "classification": (ClassificationRecipe, ("new-head", "full", "short", "adapters")),
    "distillation": (DistillationRecipe, ("distill", "heal")),
    "detection": (DetectionRecipe, tuple(name for name in RECIPES if name.startswith("detector"))),
    "segmentation": (SegmentationRecipe, tuple(name for name in RECIPES if name.startswith("segmenter"))),
}


def plain(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_can_be_read_printed_and_read_again(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    (task,) = (task for task, (kind, names) in TASKS.items() if name in names)
    assert type(recipe) is TASKS[task][0] and recipe.task == task
    assert list(plain(recipe)) == [field.name for field in fields(TASKS[task][0])]


@pytest.mark.parametrize("name", OF_0_1)
def test_published_values_are_those_of_0_1_and_its_files_still_load(name: str, tmp_path: Path) -> None:
    of_machine = {setting: OF_0_1[name][setting] for setting in ("workers", "precision")}  # chosen by the machine since
    recipe = load_recipe(name, of_machine)
    values = {setting: value for setting, value in plain(recipe).items() if setting not in SINCE_0_1}
    assert values.items() <= OF_0_1[name].items() and load_recipe(name).workers in (-1, 0)
    assert load_recipe(name).precision == ("float32" if name == "heal" else "auto")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(OF_0_1[name]))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(tmp_path / "recipe.yaml", ["seed=3"]).seed == 3
    with pytest.raises(ValueError, match="has no setting 'colour'"):
        load_recipe(tmp_path / "recipe.yaml", ["colour=1"])


def test_a_setting_of_0_1_is_of_some_task() -> None:
    names = {field.name for kind, _ in TASKS.values() for field in fields(kind)}
    assert names == {*OF_0_1["full"], *SINCE_0_1}


def test_recipes_have_the_values_of_the_paper() -> None:
    full, short, adapters = (load_recipe(name) for name in ("full", "short", "adapters"))
    assert isinstance(full, ClassificationRecipe) and isinstance(short, ClassificationRecipe)
    assert (full.layer_decay, full.lr, full.batch_size, full.epochs) == (0.75, 1.5e-3, 1024, 50)
    assert full.auto_augment and full.erasing and full.mixup and full.cutmix and full.drop_path and full.ema
    assert (short.epochs, short.lr, short.layer_decay, short.crop, short.flip) == (1, 1e-6, 0.99, 1.0, 0.0)
    assert adapters.trains == "new" and adapters.lr == pytest.approx(full.lr / 10)


def test_every_value_can_be_replaced() -> None:
    recipe = load_recipe(
        "short", ["lr=3e-4", "keep-also=0.6, 0.8", "per_image=true", "betas=[0.9, 0.95]", "scorer=glance"]
    )
    assert recipe.lr == 3e-4 and recipe.keep_also == (0.6, 0.8) and recipe.per_image
    assert recipe.betas == (0.9, 0.95) and recipe.scorer == "glance" and recipe.epochs == 1
    assert recipe.shares == (0.5, 0.6, 0.8)
    assert load_recipe("full", {"batch_size": 256}).peak_lr == pytest.approx(1.5e-3 / 4)
    assert isinstance(load_recipe("short", ["objective=distill"]), DistillationRecipe)


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("short", "learning_rate=1", "a classification recipe has no setting 'learning_rate': did you mean"),
        ("short", "epoch=1", "a classification recipe has no setting 'epoch': did you mean 'epochs'?"),
        (
            "short",
            "cascade=true",
            "a classification recipe has no setting 'cascade', which is a setting of detection: did you",
        ),
        (
            "heal",
            "label_smoothing=0.1",
            "a distillation recipe has no setting 'label_smoothing', which is a setting of class",
        ),
        ("heal", "tempereture=2", "did you mean 'temperature'?"),
        (
            "detector",
            "crop=0.5",
            "a detection recipe has no setting 'crop', which is a setting of classification and distillat",
        ),
        ("detector", "slide=true", "which is a setting of segmentation"),
        (
            "segmenter",
            "masks=true",
            "a segmentation recipe has no setting 'masks', which is a setting of detection: did you mean",
        ),
        ("segmenter", "deths=[1]", "did you mean 'depths'?"),
        ("full", "objective=distill", "a distillation recipe has no setting 'label_smoothing'"),
        ("full", "objective=boxen", "objective='boxen' must be 'labels' or 'distill' or 'boxes' or 'pixels'"),
        ("detector", "method=tome", "method='tome' must be 'apt' or 'uniform' or 'resize'"),
        ("short", "trains=heads", "trains='heads' must be 'all' or 'new'"),
        ("short", "scorer=spread", "scorer=spread predicts the outputs of a detector or segmenter"),
        ("segmenter", "distort=2", "distort=2 must be between 0 and 1"),
        ("short", "epochs=1.5", "epochs=1.5 must be a whole number"),
        ("short", "epochs=many", "epochs='many' must be a whole number"),
        ("short", "lr=-1", "lr=-1 must not be negative"),
        ("short", "keep=0", "keep=0 must be above 0"),
        ("short", "keep=1.5", "keep=1.5 must be between 0 and 1"),
        ("short", "blend=2", "blend=2 must be between 0 and 1"),
        ("short", "keep_also=[0.5, 2]", "keep_also=2 must be above 0 and at most 1"),
        ("short", "method=magic", "method='magic' must be 'apt' or 'uniform'"),
        ("short", "ema=yes please", "ema='yes please' must be a number"),
        ("short", "compile=1", "compile=1 must be true or false"),
        ("short", "betas=[0.9]", "must be two numbers"),
        ("heal", "feature_depths=[0]", "must be fractions of the number of blocks"),
        ("heal", "interpolate=2", "interpolate=2 must be between 0 and 1"),
        ("short", "lr", "'lr' must be NAME=VALUE"),
        ("short", "scales=17", "scales=17 must be at most 16"),
        ("short", "workers=100000", "workers=100000 must be at most 1,024"),
        ("detector", "seed=1e99", "must be at most 4,294,967,295"),
        ("detector", "optimizer=os.system", "optimizer='os.system' must be the name of an optimizer of timm"),
    ],
)
def test_wrong_values_are_named(name: str, word: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_recipe(name, [word])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_thresholds_and_shares_exclude_each_other() -> None:
    assert load_recipe("short", ["thresholds=[5.5]"]).thresholds == (5.5,)
    with pytest.raises(ValueError, match="leave out per_image"):
        load_recipe("short", ["thresholds=[5.5]", "per_image=true"])


@pytest.mark.parametrize("word", ["thresholds=[5.5]", "per_image=true"])
def test_a_blend_finds_its_thresholds(word: str) -> None:
    with pytest.raises(ValueError, match="set blend=0"):
        load_recipe("short", ["blend=0.5", word])


def test_files_that_are_not_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe 'long': use new-head, short"):
        load_recipe("long")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must hold names and values"):
        load_recipe(tmp_path / "b.yaml")
    # A user's file with a setting of another task is not a file of 0.1.
    (tmp_path / "c.yaml").write_text("objective: boxes\nlabel_smoothing: 0.1\n")
    with pytest.raises(ValueError, match="a detection recipe has no setting 'label_smoothing'"):
        load_recipe(tmp_path / "c.yaml")
