from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import aptvit


@pytest.fixture
def make_model(make_host: Callable[..., Any]) -> Callable[..., Any]:
    """EVA-02 of four blocks for 128 x 128 pixels, adaptive, half of its blocks windowed."""

    def make(windowed: bool = True, depth: int = 4, **options: Any) -> Any:
        vit = make_host("eva02_tiny_patch14_224", patch_size=16, depth=depth, class_token=False, global_pool="avg")
        defaults = {"window_size": 4, "global_blocks": [1, 3]} if windowed else {}
        return aptvit.adapt(vit, **{**defaults, **options})

    return make
