from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import aptvit
from aptvit.training import DistillationRecipe
from aptvit.training.objectives import Learner, Outputs, block_depths, distillation_loss, label_loss


def test_label_loss_is_cross_entropy() -> None:
    logits, targets = torch.randn(4, 7), torch.randn(4, 7).softmax(1)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(label_loss(logits, targets), expected)


def test_distillation_by_its_formula() -> None:
    random = np.random.default_rng(0)
    logits, pooled, maps = (random.normal(size=(2, 3, *shape)) for shape in ((7,), (5,), (4, 5)))
    student, teacher = (
        Outputs(*(torch.tensor(array[i]) for array in (logits, pooled)), maps=(torch.tensor(maps[i]),))
        for i in range(2)
    )
    recipe = DistillationRecipe(temperature=2.0, logits_weight=0.5, pooled_weight=3.0, features_weight=2.0)

    def softmax(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    q, p = softmax(logits[0] / 2), softmax(logits[1] / 2)
    expected = 0.5 * 4 * (p * np.log(p / q)).sum(1)
    expected += 3.0 * ((pooled[0] - pooled[1]) ** 2).mean(1) / pooled[1].var(1, ddof=1)
    variance = maps[1].var(1, ddof=1, keepdims=True)  # (3, 1, 5), of each channel over the cells
    expected += 2.0 * ((maps[0] - maps[1]) ** 2 / np.maximum(variance, 0.01 * variance.mean(2, keepdims=True))).mean(
        (1, 2)
    )
    np.testing.assert_allclose(distillation_loss(student, teacher, recipe).numpy(), expected, rtol=1e-5)


def test_with_nothing_merged_the_loss_is_zero() -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=5).eval()
    recipe = DistillationRecipe(pooled_weight=1.0, features_weight=1.0, feature_depths=(0.5, 1.0))
    depths = block_depths(vit, recipe)
    assert depths == [len(vit.blocks) // 2 - 1, len(vit.blocks) - 1]
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        teacher = Learner(vit, depths, with_features=True)(images)
        same, merged = (
            Learner(aptvit.adapt(vit, keep=keep, scales=2).eval(), depths, with_features=True)(images)
            for keep in (1.0, 0.4)
        )
    torch.testing.assert_close(teacher.logits, vit(images))
    assert teacher.maps[0].shape == same.maps[0].shape == (2, 100, vit.embed_dim)
    assert distillation_loss(same, teacher, recipe).max() < 1e-6
    assert distillation_loss(merged, teacher, recipe).min() > 1e-4


def test_learners_return_logits_only_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = timm.create_model("test_vit", num_classes=5).eval()
    outputs = Learner(vit)(torch.rand(1, 3, 160, 160))
    assert outputs.pooled is None and outputs.maps == ()
