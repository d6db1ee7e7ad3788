"""What a training that is continued must agree on, and what happens if it does not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aptvit.datasets.boxes import BoxFiles
from aptvit.datasets.masks import MaskFiles
from aptvit.datasets.sources import Files, hold_back, with_classes
from aptvit.hosts.pretrained import load_host
from aptvit.training import ClassificationRecipe, find_sources
from aptvit.training.agreement import describe_data
from aptvit.training.trainer import Training

from .conftest import MODEL, SMALL

VALUES: dict[str, Any] = {**SMALL, "max_steps": 2, "save_every": 1, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def make(folder: Path, checkpoint: Path) -> Callable[..., Training]:
    """Make a training in a folder, with changed settings, weights, images or classes."""

    def make(run: Path, weights: Path = checkpoint, change: Any = lambda source: source, **values: Any) -> Training:
        images, evaluation = find_sources(folder)
        recipe = ClassificationRecipe(**{**VALUES, **values})
        training = Training(recipe, load_host(MODEL, weights), change(images), evaluation, run)
        training._measure_speedup = lambda: None  # type: ignore[method-assign]
        return training

    return make


@pytest.fixture(scope="module")
def trained(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run: Path = tmp_path_factory.mktemp("trained")
    make(run).run()
    return run


def other_order(source: Files) -> Files:
    return replace(source, paths=source.paths[::-1])


CHANGES: dict[str, dict[str, Any]] = {
    r"lr: 0\.001 → 0\.01; ": {"lr": 0.01},
    r"max_steps: 2 → 3; ": {"max_steps": 3},
    r"seed: 0 → 1; ": {"seed": 1},
    r"thresholds: +→ 5\.0; ": {"thresholds": (5.0,)},
    r"training images: 20 \(\w+\) → 20 \(\w+\); ": {"change": other_order},
    r"training images: 20 \(\w+\) → 10 \(\w+\); ": {"change": lambda source: hold_back(source, 0.5)[0]},
    r"classes: cat, cup → cup, cat; ": {"change": lambda source: with_classes(source, ["cup", "cat"])},
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_differs_is_refused_by_name(message: str, make: Any, trained: Path) -> None:
    values = CHANGES[message]
    values = {**values, "per_image": False} if "thresholds" in values else values
    before = sorted(trained.rglob("*"))
    with pytest.raises(ValueError, match=r"00000002 was trained with other settings \(") as refused:
        make(trained, **values).find_checkpoint()
    text = str(refused.value).partition("(")[2].replace("): ", "; ")

    assert re.search(message, text) and "begin in another --out" in text and "--allow-changes" in text
    assert sorted(trained.rglob("*")) == before


def test_other_weights_of_the_same_shapes_are_refused(
    make: Any, trained: Path, checkpoint: Path, tmp_path: Path
) -> None:
    weights = load_file(checkpoint)
    weights["blocks.0.norm1.bias"][0] += 1
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other settings \(weights of the model: \w+ → \w+\)"):
        make(trained, weights=tmp_path / "other.safetensors").find_checkpoint()


def test_what_does_not_change_the_training_may_differ(make: Any, trained: Path) -> None:
    free = {"workers": 1, "save_every": 5, "keep_checkpoints": 9, "eval_every": 3}
    assert make(trained, **free).find_checkpoint() == []


@pytest.mark.parametrize("values", [{"optimizer": "sgd"}, {"method": "resize"}, {"trains": "new"}])
def test_what_the_checkpoint_does_not_fit_cannot_be_allowed(values: dict[str, Any], make: Any, trained: Path) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=rf"cannot be continued with other settings \({name}: "):
        make(trained, **values).find_checkpoint(allow_changes=True)


def test_changes_that_are_allowed_take_effect(make: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    values = {"max_steps": 3, "lr": 0.01, "weight_decay": 0.2, "per_image": False, "keep": 0.7}
    changed = make(tmp_path / "run", change=lambda source: hold_back(source, 0.5)[0], **values)
    changes = changed.find_checkpoint(allow_changes=True)
    assert {change.partition(":")[0] for change in changes} == {*values, "training images"}
    results = changed.run(resume=True)
    assert results["finished"] and results["updates"] == 3
    assert {group["weight_decay"] for group in changed.optimizer.param_groups} == {0.0, 0.2}
    assert changed.checkpoint.agreement["lr"] == 0.001
    again = make(tmp_path / "run", change=lambda source: hold_back(source, 0.5)[0], **values)
    assert again.find_checkpoint() == [] and again.checkpoint.update == 3
    three = make(tmp_path / "run", change=lambda source: replace(source, classes=["a", "b", "c"]))
    three.find_checkpoint(allow_changes=True)
    with pytest.raises(ValueError, match=r"00000003 does not fit this model \(.*head"):
        three.run(resume=True)


def test_a_folder_with_a_training_is_not_trained_in_anew(make: Any, trained: Path) -> None:
    with pytest.raises(ValueError, match="holds a training already"):
        make(trained).run()


def test_data_is_described_by_names_order_and_annotations(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / f"{i}.png" for i in range(3)]
    moved = [tmp_path / "b" / f"{i}.png" for i in range(3)]
    box, labels = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0])
    boxes = BoxFiles(paths, [box] * 3, [labels] * 3, ["x"])
    same = [
        [Files(paths, [0, 1, 0], ["x", "y"]), Files(moved, [0, 1, 0], ["x", "y"])],
        [Files(paths, [0, 1, 1], ["x", "y"])],
        [Files(paths[::-1], [0, 1, 0], ["x", "y"])],
        [Files(paths[:2], [0, 1], ["x", "y"])],
        [boxes, replace(boxes, paths=moved)],
        [replace(boxes, boxes=[2 * box, box, box])],
        [replace(boxes, labels=[labels + 1, labels, labels])],
        [MaskFiles(paths, paths), MaskFiles(moved, moved)],
        [MaskFiles(paths, paths[::-1])],
        [None],
    ]
    described = [{describe_data(images) for images in group} for group in same]
    assert all(len(group) == 1 for group in described) and len(set.union(*described)) == len(same)
