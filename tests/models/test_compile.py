"""``torch.compile`` of a whole adaptive model: the eager answer, in a bounded number of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import aptvit


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches(images: Tensor) -> list[Tensor]:
    """The same images, from top to bottom more and more of them smooth: other numbers of tokens."""
    result = []
    for rows in range(7):
        batch = images.clone()
        batch[:, :, : 16 * rows] *= 0.01
        result.append(batch)
    return result


@pytest.mark.parametrize(
    ("installed", "options", "training"),
    [
        pytest.param(*case, marks=() if number in (0, 3, 5, 6) else pytest.mark.slow)  # each pair of two is in these
        for number, case in enumerate(
            product([True, False], [{"thresholds": (6.0, 6.0)}, {"keep": 0.5}], [False, True])
        )
    ],
    ids=str,
)
def test_few_graphs_and_the_eager_answer(
    make_host: Callable[..., Any],
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    options: dict[str, Any],
    training: bool,
) -> None:
    if installed:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr("aptvit.patching.entropy.has_numba", lambda: False)
    model = aptvit.adapt(make_host(), **options).train(training)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    graphs, tokens = [], set()
    with torch.set_grad_enabled(training):
        for number, batch in enumerate(batches(images)):
            budget = {"keep": 0.3 + 0.1 * number} if "keep" in options else {}
            tokens.add(model.layout(batch, **budget).num_tokens)
            torch.testing.assert_close(compiled(batch, **budget), model(batch, **budget), rtol=1e-5, atol=1e-5)
            graphs.append(counter.frame_count)
    assert len(tokens) >= 5 and graphs[0] > 0
    assert graphs[-1] <= graphs[1] + 1  # a third size is no new graph, nor are those after it


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"thresholds": 6.0}, id="thresholds", marks=pytest.mark.slow),
        pytest.param({"keep": 0.5}, id="keep"),
    ],
)
def test_inductor_gives_the_eager_answer_and_gradients(
    make_host: Callable[..., Any], images: Tensor, options: dict[str, Any]
) -> None:
    model = aptvit.adapt(make_host(depth=1, embed_dim=48, num_heads=2), **options)
    expected = model(images)
    direction = torch.randn_like(expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    target = torch.autograd.grad((expected * direction).sum(), parameters, allow_unused=True)
    got = torch.compile(model)(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad((got * direction).sum(), parameters, allow_unused=True)
    for one, two in zip(grads, target, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert (one - two).norm() <= 1e-3 * two.norm() + 1e-6
