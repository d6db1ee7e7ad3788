"""The classifier at the start of a training: kept, permuted or new; and recipes that cannot train a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import ImageNetInfo

from aptvit.hosts.pretrained import Host, class_names, set_class_names
from aptvit.training import find_sources, load_recipe
from aptvit.training.heads import fit_head
from aptvit.training.log import read_log
from aptvit.training.trainer import Training

from .conftest import MODEL, SMALL


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def named(names: list[str], name: str = MODEL) -> Any:
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=len(names)).eval()
    set_class_names(vit, names)
    return vit


@torch.no_grad()
def test_rows_follow_the_names_of_the_classes(images: torch.Tensor) -> None:
    vit = named(["dog", "sea horse", "cat"])
    before = vit(images)
    assert fit_head(vit, ["dog", "Sea_Horse", "cat"]) == "kept" and torch.equal(vit(images), before)
    assert fit_head(vit, ["cat", "dog", "Sea_Horse"]) == "reordered"
    torch.testing.assert_close(vit(images), before[:, [2, 0, 1]])
    assert class_names(vit) == ["cat", "dog", "Sea_Horse"]


@torch.no_grad()
def test_other_names_need_a_new_classifier_though_the_number_is_the_same(images: torch.Tensor) -> None:
    vit = named(["dog", "horse", "cat"])
    assert fit_head(vit, ["dog", "horse", "cow"]) == "new" and vit(images).abs().max() == 0
    assert fit_head(vit, ["dog", "horse"]) == "new" and vit.num_classes == 2


def test_without_names_the_number_decides() -> None:
    assert fit_head(timm.create_model(MODEL, num_classes=3), ["cat", "cow", "dog"]) == "unnamed"


@torch.no_grad()
def test_imagenet_is_known_by_identifiers_words_and_numbers(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    vit: Any = timm.create_model(MODEL, num_classes=1000).eval()
    before, wnids = vit(images), ImageNetInfo("imagenet-1k").label_names()
    assert class_names(vit)[0] == "tench"  # type: ignore[index]
    assert fit_head(vit, wnids[::-1]) == "reordered"
    torch.testing.assert_close(vit(images), before.flip(1))
    vit = timm.create_model(MODEL, num_classes=1000)
    numbers = sorted(map(str, range(1000)))  # as folders are sorted: 0, 1, 10, 100, ...
    weight = vit.head.weight.clone()
    assert fit_head(vit, numbers) == "reordered" and torch.equal(vit.head.weight[2], weight[10])
    assert fit_head(timm.create_model(MODEL, num_classes=1000), [f"part {i}" for i in range(1000)]) == "new"


@torch.no_grad()
def test_both_classifiers_of_a_distilled_model_are_new() -> None:
    vit: Any = timm.create_model("deit_tiny_distilled_patch16_224", depth=1).eval()
    assert fit_head(vit, ["a", "b"]) == "new" and vit(torch.randn(1, 3, 224, 224)).abs().max() == 0
    assert all(part.out_features == 2 for part in (vit.head, vit.head_dist))


@pytest.mark.parametrize("name", ["short", "adapters"])
def test_recipes_for_known_classes_refuse_a_new_classifier(name: str, host: Host, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(name, {"precision": "float32"})
    with pytest.raises(ValueError, match=r"2 classes of the images, and a new classifier .* use --recipe new-head"):
        Training(recipe, host, *find_sources(folder), tmp_path)


def test_too_few_updates_for_a_new_classifier_are_refused(host: Host, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe("new-head", {"precision": "float32", "epochs": 0})
    with pytest.raises(ValueError, match="does not learn in 0 updates: use --epochs 1 or more"):
        Training(recipe, host, *find_sources(folder), tmp_path)


def test_the_recipe_for_new_classes_learns_them(host: Host, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe("new-head", {**SMALL, "lr": 1e-4, "epochs": 3, "flip": 0})
    results = Training(recipe, host, *find_sources(folder), tmp_path).run()
    before, after = results["evaluations"][0], results["evaluations"][-1]
    assert before["top1"] == 0.5 and after["top1"] == 1.0 and after["images"] == 6
    (note,) = [line["message"] for line in read_log(tmp_path) if line["what"] == "note"]
    assert note == "the classifier is new, for 2 classes that the checkpoint does not have"
    page = (tmp_path / "index.html").read_text()
    assert "top1 50.0% before, 100.0% after (3 and 6 of 6 validation images)" in page
