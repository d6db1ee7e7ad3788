from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import aptvit
from aptvit.scorers.sizes import FACTORS, examples_of, part_of
from aptvit.scorers.spread import spread_of

Host = Callable[..., Any]


def edges(images: Tensor) -> Tensor:
    """Answers that are easy to foresee."""
    return images.mean(1, keepdim=True).sigmoid()


@torch.no_grad()
def test_it_learns_from_each_size_around_a_patch(make_host: Host, crops: Tensor) -> None:
    model = aptvit.adapt(make_host(), scorer="spread", scales=4, keep=0.5)
    images = crops[:3, :, :112, :80].float() / 255  # 7 x 5 patches: no whole one of eight times the size
    inputs, spread = examples_of(
        model.packed_encoder, images, lambda x: {factor: spread_of(edges(x), (7, 5), factor) for factor in FACTORS}
    )
    assert spread.shape == (3, 3, 2, len(FACTORS)) and inputs.shape[:3] == spread.shape[:3]
    fine, middle = (spread_of(edges(images), (7, 5), factor) for factor in (2, 4))
    torch.testing.assert_close(spread[..., 0], fine)
    torch.testing.assert_close(spread[:, :2, :2, 1], middle.expand(3, 2, 2))
    assert spread[:, 2, :, 1].isnan().all() and spread[..., 2].isnan().all()


def test_parts_of_large_images_know_what_is_around_them() -> None:
    """Convolutions on a crop would take its edge for that of the image."""
    truth = torch.rand(2, 40, 10, 3)
    inputs, spread = part_of(truth, truth, torch.Generator().manual_seed(1))
    assert inputs.shape == spread.shape == (2, 16, 10, 3)
    expected = ~spread.isnan()
    assert expected[:, 2:-2].all() and torch.equal(spread[expected], inputs[expected])
    assert not expected[:, 0].any() and not expected[:, -1].any()
