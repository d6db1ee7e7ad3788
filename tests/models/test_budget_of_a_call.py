"""A budget for one call does what setting it on the model does, and leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aptvit
import aptvit.patching.budget

BUDGETS: list[dict[str, Any]] = [
    {"keep": 0.4},
    {"thresholds": 6.0},
    {"thresholds": (6.5, 6.0)},
    {"max_tokens": 40},
    {"keep": 0.9, "max_tokens": 45},
]


def with_budget(model: Any, call: dict[str, Any]) -> Any:
    """The model with that budget as its own."""
    model.budget = aptvit.patching.budget.Budget(
        thresholds=None if "thresholds" not in call else aptvit.patching.budget.as_thresholds(call["thresholds"]),
        keep=None if "thresholds" in call else call.get("keep", model.keep),
        max_tokens=call.get("max_tokens"),
    )
    return model


@torch.no_grad()
@pytest.mark.parametrize("call", BUDGETS, ids=str)
def test_it_is_the_budget_of_the_model_for_one_call(
    make_host: Callable[..., Any], images: Tensor, call: dict[str, Any]
) -> None:
    host = make_host(dynamic_img_size=True)
    model, other = aptvit.adapt(host, keep=0.7), with_budget(aptvit.adapt(host, keep=0.7), call)
    before, budget = model(images), model.budget
    for batch in (images, [images[0], images[1][:, :64]]):
        assert torch.equal(model(batch, **call), other(batch))
        assert model.layout(batch, **call).seqlens == other.layout(batch).seqlens
        assert torch.equal(model.forward_features(batch, **call).tokens, other.forward_features(batch).tokens)
        got = model.forward_intermediates(batch, indices=1, intermediates_only=True, **call)[0]
        expected = other.forward_intermediates(batch, indices=1, intermediates_only=True)[0]
        assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    assert model.budget == budget and torch.equal(model(images), before)


@torch.no_grad()
def test_towers_of_transformers(images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=128, patch_size=16
    )
    host = transformers.ViTModel(config).eval()
    model, other = aptvit.adapt(host, keep=0.9), aptvit.adapt(host, keep=0.4)
    got, expected = model(images, keep=0.4), other(images)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert got.layout.seqlens == expected.layout.seqlens
    (states,), layout = model.hidden_states([1], images, keep=0.4)
    assert torch.equal(states, other.hidden_states([1], images)[0][0]) and layout.seqlens == expected.layout.seqlens
    assert model.layout(images).keep_ratio > 0.8


def test_bad_budgets_are_named(make_host: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_host(), keep=0.7)
    with pytest.raises(ValueError, match=r"keep=1\.5 must be a share"):
        model(images, keep=1.5)
    with pytest.raises(ValueError, match="not both"):
        model(images, keep=0.5, thresholds=5.0)
    with pytest.raises(ValueError, match="max_tokens=3 cannot be reached"):
        model(images, max_tokens=3)
    with pytest.raises(ValueError, match="thresholds must be numbers"):
        model.layout(images, thresholds=("5",))
    with pytest.raises(ValueError, match=r"a layout fixes the number of tokens: give either layout= or keep"):
        model(images, model.layout(images), keep=0.5)
    with pytest.raises(TypeError, match="tokens"):
        model(images, tokens=5)
