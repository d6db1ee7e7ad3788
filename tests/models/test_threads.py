"""One model answers many threads at once as it answers alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import aptvit

KINDS: dict[str, dict[str, Any]] = {
    "entropy, share": {"keep": 0.6},
    "entropy, thresholds": {"thresholds": (6.0, 6.5)},
    "laplacian": {"scorer": "laplacian", "keep": 0.6},
    "upsample, windows, bias": {
        "scorer": "upsample",
        "keep": 0.6,
        "window_size": 4,
        "global_blocks": [1],
        "area_bias": 0.5,
        "pad": True,
    },
    "embedding": {"scorer": "embedding", "keep": 0.6},
    "glance": {"scorer": "glance", "keep": 0.6},
    "spread": {"scorer": "spread", "keep": 0.6},
    "preview": {"scorer": "preview", "keep": 0.6},
    "limits, buckets": {"keep": 0.6, "max_tokens": 40, "token_bucket": 32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_eight_threads_get_the_answers_of_one(make_host: Callable[..., Any], crops: Tensor, kind: str) -> None:
    """Images of many sizes, alone and together, with budgets of the model and of the call."""
    model = aptvit.adapt(make_host(dynamic_img_size=True), **KINDS[kind])
    pixels = (crops.float() / 255 - 0.5) / 0.5
    if kind == "glance":
        aptvit.fit_glance(model, pixels[:16], epochs=1)
    if kind == "spread":
        aptvit.fit_spread(model, pixels[:16], lambda x: x, updates=2)
    sizes = [(16 * (4 + i % 5), 16 * (4 + i * 3 % 5)) for i in range(16)]
    separate = [[image[:, :height, :width]] for image, (height, width) in zip(pixels, sizes, strict=False)]
    joint = [[*a, *b] for a, b in itertools.pairwise(separate)]
    budgets = [{}, {"keep": 0.5}, {"keep": 0.75}] if model.keep else [{}, {"thresholds": (6.5,)}]
    jobs = [(batch, budget) for batch in (*separate, *joint[:8]) for budget in budgets]

    @torch.no_grad()
    def answer(job: tuple[list[Tensor], dict[str, Any]]) -> Tensor:
        logits: Tensor = model(job[0], **job[1])
        return logits

    expected = [answer(job) for job in jobs]
    model.train().eval()  # nothing is kept from before
    with ThreadPoolExecutor(8) as pool:
        for got, target in zip(pool.map(answer, jobs), expected, strict=True):
            torch.testing.assert_close(got, target, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_call_reads_the_budget_once(make_host: Callable[..., Any], images: Tensor) -> None:
    """What another thread sets while a call scores is for later calls."""
    model: Any

    def lowering(pixels: Tensor, patch_size: int, factors: list[int]) -> dict[int, Tensor]:
        model.thresholds = (-1.0, -1.0, -1.0)
        return {f: torch.zeros(len(pixels), *(side // (f * patch_size) for side in pixels.shape[2:])) for f in factors}

    model = aptvit.adapt(make_host(), thresholds=1.0, scorer=lowering)
    assert model.layout(images).counts == [[0, 16]] * len(images)
    assert model.layout(images).is_uniform
