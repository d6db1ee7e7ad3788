from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.scorers.sizes import FACTORS
from aptvit.scorers.spread import SpreadScorer, spread_of

Host = Callable[..., Any]


def edges(images: Tensor) -> Tensor:
    """Answers that are easy to foresee: bright or dark."""
    bright = torch.sigmoid(8 * F.avg_pool2d(images, 5, 1, 2).mean(1, keepdim=True))
    return torch.cat([bright, 1 - bright], dim=1)


@pytest.fixture
def crops(crops: Tensor) -> Tensor:
    """(40, 3, 128, 128), normalised."""
    return (crops.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("places", [1, 4])
def test_spread_is_the_variance_inside_a_patch(factor: int, places: int) -> None:
    grid = (9, 10)
    answers = torch.rand(2, 3, grid[0] * places, grid[1] * places)
    result = spread_of(answers, grid, factor)
    assert result.shape == (2, grid[0] // factor, grid[1] // factor)
    side = factor * places
    for b, row, col in np.ndindex(*result.shape):
        patch = answers[b, :, row * side : (row + 1) * side, col * side : (col + 1) * side].double().numpy()
        assert float(result[b, row, col]) == pytest.approx(patch.var((1, 2)).sum(), rel=1e-4)


def test_answers_that_do_not_fit_are_refused(make_host: Host, crops: Tensor) -> None:
    with pytest.raises(ValueError, match=r"answers of \(5, 8\) places do not fit a grid of \(8, 8\) patches"):
        spread_of(torch.rand(1, 1, 5, 8), (8, 8), 2)
    model = aptvit.adapt(make_host(), scorer="spread", keep=0.5)
    with pytest.raises(ValueError, match="do not fit"):
        aptvit.fit_spread(model, crops, lambda images: torch.rand(len(images), 2, 9, 9))


def test_what_it_foresees_is_what_the_network_says(make_host: Host, crops: Tensor) -> None:
    host = make_host()
    model = aptvit.adapt(host, scorer="spread", scales=3, keep=0.5)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    with pytest.raises(ValueError, match=r"not trained yet: call aptvit.fit_spread"):
        model(crops[:2])
    assert 0.05 < aptvit.fit_spread(model, crops.split(8), edges, updates=200) <= 1
    assert all(torch.equal(host.state_dict()[name], value) for name, value in before.items())
    ((_, scores),) = model.scores(crops)
    for factor in (2, 4):
        true, guess = spread_of(edges(crops), (8, 8), factor), scores[factor]
        assert abs(float(guess.mean() / true.mean()) - 1) < 0.3  # the spread as it is, not up to a factor
        assert float(torch.corrcoef(torch.stack([guess.flatten(), true.flatten()]))[0, 1]) > 0.6


def test_it_travels_with_the_model(make_host: Host, crops: Tensor, tmp_path: Any) -> None:
    model = aptvit.adapt(make_host(), scorer="spread", keep=0.6)
    aptvit.fit_spread(model, crops, edges, updates=2)
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path)
    assert isinstance(again.patchifier.scorer, SpreadScorer)
    assert torch.equal(again(crops[:4]), model(crops[:4]))


@pytest.mark.parametrize("size", [(112, 128), (48, 144), (32, 16)])
def test_any_size_and_odd_grids(make_host: Host, crops: Tensor, size: tuple[int, int]) -> None:
    model = aptvit.adapt(make_host(), scorer="spread", scales=3, thresholds=(math.inf, -1.0))
    aptvit.fit_spread(model, [*crops[:4], *crops[4:8, :, :96]], edges, updates=2)
    rows, cols = size[0] // 16, size[1] // 16
    seqlens = model.layout(torch.rand(3, 3, *size)).seqlens
    assert set(seqlens) == {1 + rows * cols - 3 * (rows // 2) * (cols // 2)}


def test_windows(make_host: Host, crops: Tensor) -> None:
    model = aptvit.adapt(make_host(), scorer="spread", thresholds=math.inf, window_size=4, global_blocks=[1])
    aptvit.fit_spread(model, crops[:8], edges, updates=2)
    assert model.layout(crops[:2]).keep_ratio == 0.25


def test_what_cannot_be_fitted_is_refused(make_host: Host, crops: Tensor) -> None:
    with pytest.raises(ValueError, match="this model predicts no spread"):
        aptvit.fit_spread(aptvit.adapt(make_host(), scorer="glance"), crops, edges)
    model = aptvit.adapt(make_host(), scorer="spread", scales=5, keep=0.5)
    aptvit.fit_spread(model, crops[:4], edges, updates=1)
    with pytest.raises(ValueError, match="patches of 16 times the size is not predicted: use up to 4 scales"):
        model.layout(F.interpolate(crops[:1], 256))
