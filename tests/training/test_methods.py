"""The number of tokens that the model of a recipe keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from aptvit.training import ClassificationRecipe
from aptvit.training.methods import Shares, build_model


def test_a_blend_keeps_the_share_on_average_but_not_of_every_image(
    make_host: Callable[..., Any], images: Tensor
) -> None:
    ranges = {}
    kinds: dict[str, dict[str, Any]] = {"thresholds": {}, "blend": {"blend": 0.5}, "share": {"per_image": True}}
    for kind, values in kinds.items():
        recipe = ClassificationRecipe(keep=0.6, keep_also=(0.8,), **values)
        model = build_model(make_host(), recipe)
        shares = Shares(model, recipe)
        shares.calibrate(iter([images[:2], images[2:]]))  # a single pass for all shares
        for share in shares.in_use:
            shares.set(share)
            layout = model.layout(images)
            assert layout.keep_ratio == pytest.approx(share, abs=0.03)
            ranges[kind, share] = max(layout.seqlens) - min(layout.seqlens)
    for share in (0.6, 0.8):
        assert ranges["thresholds", share] > ranges["blend", share] > ranges["share", share] == 0
