from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from aptvit.training import RECIPES, Recipe, load_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_can_be_read_printed_and_read_again(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "mine.yaml") == recipe
    assert set(yaml.safe_load(recipe.to_yaml())) == set(asdict(Recipe()))


def test_recipes_are_the_papers() -> None:
    full, short, adapters = (load_recipe(name) for name in ("full", "short", "adapters"))
    assert (full.layer_decay, full.lr, full.batch_size, full.epochs) == (0.75, 1.5e-3, 1024, 50)
    assert full.auto_augment and full.erasing and full.mixup and full.cutmix and full.drop_path and full.ema
    assert (short.epochs, short.lr, short.layer_decay, short.crop, short.flip) == (1, 1e-6, 0.99, 1.0, 0.0)
    assert adapters.trains == "new" and adapters.lr == pytest.approx(full.lr / 10)
    assert load_recipe("distill").objective == load_recipe("heal").objective == "distill"


def test_every_value_can_be_replaced() -> None:
    recipe = load_recipe(
        "short", ["lr=3e-4", "keep-also=0.6, 0.8", "per_image=true", "betas=[0.9, 0.95]", "scorer=glance"]
    )
    assert recipe.lr == 3e-4 and recipe.keep_also == (0.6, 0.8) and recipe.per_image
    assert recipe.betas == (0.9, 0.95) and recipe.scorer == "glance" and recipe.epochs == 1
    assert recipe.shares == (0.5, 0.6, 0.8)
    assert load_recipe("full", {"batch_size": 256}).peak_lr == pytest.approx(1.5e-3 / 4)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learning_rate=1", "a recipe has no 'learning_rate'"),
        ("epoch=1", "did you mean epochs"),
        ("epochs=1.5", "epochs=1.5 must be a whole number"),
        ("epochs=many", "epochs='many' must be a whole number"),
        ("lr=-1", "lr=-1 must not be negative"),
        ("keep=0", "keep=0 must be above 0"),
        ("keep=1.5", "keep=1.5 must be a share"),
        ("blend=2", "blend=2 must be a share"),
        ("keep_also=[0.5, 2]", "keep_also=2 must be a share"),
        ("method=magic", "method='magic' must be 'apt' or 'uniform'"),
        ("ema=yes please", "ema='yes please' must be a number"),
        ("compile=1", "compile=1 must be true or false"),
        ("betas=[0.9]", "must be two numbers"),
        ("feature_depths=[0]", "must be shares of all blocks"),
        ("lr", "'lr' must be NAME=VALUE"),
        ("thresholds=[5.5]", ""),
    ],
)
def test_wrong_values_are_named(word: str, message: str) -> None:
    if not message:
        assert load_recipe("short", [word]).thresholds == (5.5,)
        with pytest.raises(ValueError, match="leave per_image"):
            load_recipe("short", [word, "per_image=true"])
        return
    with pytest.raises(ValueError) as refused:
        load_recipe("short", [word])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("word", ["thresholds=[5.5]", "per_image=true"])
def test_a_blend_finds_its_thresholds(word: str) -> None:
    with pytest.raises(ValueError, match="set blend=0"):
        load_recipe("short", ["blend=0.5", word])


def test_files_that_are_no_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe 'long': use full, short"):
        load_recipe("long")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must hold names and values"):
        load_recipe(tmp_path / "b.yaml")
