"""What must hold after the statements of docs/how-to/heal.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from snippets.checks import (
    Page,
    after,
)

import aptvit


@after("model = aptvit.from_pretrained('healed/model')")
@torch.no_grad()
def _(page: Page) -> None:
    assert not page.model.training and page.model.thresholds == page.written.thresholds
    assert torch.equal(page.model(page.images), page.written(page.images))


@after("aptvit.calibrate(model, images, keep=0.67)")
def _(page: Page) -> None:
    assert page.model.layout(page.images).keep_ratio == pytest.approx(0.67, abs=0.03)


@after("images, held_out = hold_back(photos(['holiday/']), 0.1)")
def _(page: Page) -> None:
    """Every tenth of eighteen."""
    names = sorted(Path("holiday").iterdir())
    assert (len(page.images), len(page.held_out)) == (17, 1)
    with Image.open(names[9]) as photo:
        np.testing.assert_array_equal(np.asarray(page.held_out.load(0)[0]), np.asarray(photo))


@after("Training(load_recipe('heal', {'keep': 0.5}), host, images, held_out, 'healed').run()")
@torch.no_grad()
def _(page: Page) -> None:
    """What docs/how-to/finetune.md lists is there, and the model is another one that keeps half of the tokens."""
    results = json.loads(Path("healed/results.json").read_text())
    assert results == json.loads(json.dumps(page.value))
    assert [json.loads(line) for line in Path("healed/log.jsonl").read_text().splitlines()]
    assert {"index.html", "checkpoints", "model"} <= {path.name for path in Path("healed").iterdir()}
    model = aptvit.from_pretrained("healed/model")
    assert model.num_classes == page.host.model.num_classes
    photos = torch.stack([torch.from_numpy(np.array(page.images.load(i)[0])).permute(2, 0, 1) for i in range(17)])
    assert model.layout(photos).keep_ratio == pytest.approx(0.5, abs=0.05)
