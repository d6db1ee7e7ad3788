"""What must hold after the statements of docs/how-to/heal.md and finetune.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from snippets.checks import (
    Page,
    after,
)


@after("model = aptvit.from_pretrained('healed/model')")
@torch.no_grad()
def _(page: Page) -> None:
    assert not page.model.training and page.model.thresholds == page.written.thresholds
    assert torch.equal(page.model(page.images), page.written(page.images))


@after("aptvit.calibrate(model, images, keep=0.67)")
def _(page: Page) -> None:
    assert page.model.layout(page.images).keep_ratio == pytest.approx(0.67, abs=0.03)


@after("trained = aptvit.training.heal(model, 'holiday/', minutes=8, keep=0.5)")
def _(page: Page) -> None:
    """Another model, which keeps half of the tokens; that of the page has its weights and thresholds still."""
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(Path("holiday").iterdir())])
    assert page.trained.model.layout(images.permute(0, 3, 1, 2)).keep_ratio == pytest.approx(0.5, abs=0.07)
    assert page.model.layout(page.images).keep_ratio == pytest.approx(0.67, abs=0.03)
    assert torch.equal(page.model.head.weight, page.written.head.weight)


@after("trained.model, trained.results['evaluations']")
def _(page: Page) -> None:
    model, evaluations = page.value
    assert model.num_classes == page.model.num_classes and all("agreement" in line for line in evaluations)


@after("trained = aptvit.training.finetune(model, 'flowers/', recipe='new-head', epochs=1)")
def _(page: Page) -> None:
    assert page.trained.model.class_names == ["rose", "tulip"] and page.model.num_classes != 2


@after("trained.model, trained.results['evaluations'][-1]['top1']")
def _(page: Page) -> None:
    assert page.value[0].num_classes == 2 and 0 <= page.value[1] <= 1
