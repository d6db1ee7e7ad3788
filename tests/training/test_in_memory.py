"""Healing and fine-tuning of a model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import aptvit
from aptvit.hosts.pretrained import Host, class_names, set_class_names
from aptvit.training import finetune, heal

from .conftest import same

FAST = {"precision": "float32", "workers": 0, "batch_size": 4, "max_steps": 2}


def test_an_adaptive_model_is_healed_and_stays_as_it_is(host: Host, folder: Path) -> None:
    model = aptvit.adapt(host.model, keep=0.6, scorer="laplacian", scales=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = heal(model, folder / "train", keep=0.6, interpolate=0.0, **FAST)
    assert same(model.state_dict(), before) and not same(trained.model.state_dict(), before)
    assert trained.results["updates"] == 2 and "agreement" in trained.results["evaluations"][-1]
    assert trained.model.patchifier.scorer_name == "laplacian" and trained.model.num_scales == 3
    assert not trained.model.training and trained.model(torch.rand(2, 3, 160, 160)).shape == (2, 10)


def test_new_parameters_of_an_adaptive_model_are_where_its_training_starts(host: Host, folder: Path) -> None:
    model = aptvit.adapt(host.model, keep=0.6, init="nonzero")
    trained = heal(model, folder / "train", keep=0.6, **{**FAST, "max_steps": 1, "lr": 1e-12})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_timm_model_is_fine_tuned_for_the_classes_of_a_folder(host: Host, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use --recipe new-head"):
        finetune(host.model, folder)
    trained = finetune(
        host.model, folder, recipe="new-head", keep=0.6, out=tmp_path, lr=1e-3, **{**FAST, "max_steps": 3}
    )
    assert host.model.num_classes == 10 and trained.model.num_classes == 2
    assert trained.model.class_names == ["cat", "cup"] == class_names(aptvit.from_pretrained(tmp_path / "model"))
    assert trained.results["evaluations"][0]["top1"] == 0.5


def test_a_trained_model_is_trained_further(folder: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=2)
    set_class_names(vit, ["cat", "cup"])
    trained = finetune(aptvit.adapt(vit, keep=0.6), folder, keep=0.6, **FAST)  # "short": no new classifier
    head = trained.model.state_dict()["head.weight"]
    torch.testing.assert_close(head, vit.head.weight.detach(), rtol=0, atol=1e-4)


def test_models_that_could_not_be_saved_are_refused_before_the_training(folder: Path) -> None:
    vit = timm.models.VisionTransformer(img_size=32, depth=1, num_classes=2)
    with pytest.raises(ValueError, match="not made by timm"):
        finetune(vit, folder)
    with pytest.raises(ValueError, match="method=uniform gives no adaptive model"):
        finetune(vit, folder, method="uniform")
