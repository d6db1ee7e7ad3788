"""What no other test of the core noticed when it was broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aptvit
from aptvit.encoder.clips import choose_rows
from aptvit.patching.budget import Budget
from aptvit.patching.limits import choose_within_limits
from aptvit.patching.patchifier import Patchifier


@pytest.mark.parametrize("max_tokens", [21, 40, 60, 65])
def test_max_tokens_is_stronger_than_min_keep(max_tokens: int) -> None:
    """Merges are the cheapest of each image, as many as thresholds, then the floor, then the ceiling allow."""
    scores, prefix, threshold, min_keep = torch.rand(5, 4, 4), 1, 0.6, 0.9
    budget = Budget((threshold,), min_keep=min_keep, max_tokens=max_tokens)
    (scale_map,) = choose_within_limits([{2: scores}], [(8, 8)], [5], budget, prefix)
    most, least = math.floor((1 - min_keep) * 64 / 3), max(0, math.ceil((64 + prefix - max_tokens) / 3))
    for image, costs in zip(scale_map.numpy(), scores.numpy(), strict=True):
        merges = max(least, min(most, int((costs < threshold).sum())))
        expected = np.zeros(16, dtype=int)
        expected[np.argsort(costs.ravel())[:merges]] = 1
        np.testing.assert_array_equal(image[::2, ::2].ravel(), expected)
        assert 64 - 3 * merges + prefix <= max_tokens


@pytest.mark.parametrize("max_batch_tokens", [100, 88, 70])
def test_min_keep_holds_while_a_batch_can_do_with_it(max_batch_tokens: int) -> None:
    """Merges that the floors allow, the cheapest first, then the others, by numpy."""
    scores = torch.rand(2, 4, 4) + torch.tensor([0.0, 2.0])[:, None, None]  # all of the first cost less
    budget = Budget((-1.0,), min_keep=0.62, max_batch_tokens=max_batch_tokens)
    (scale_map,) = choose_within_limits([{2: scores}], [(8, 8)], [2], budget)
    costs = np.sort(scores.numpy().reshape(2, 16))
    beyond = np.arange(16) >= math.floor((1 - 0.62) * 64 / 3)
    order = sorted((bool(beyond[rank]), float(costs[i, rank]), i) for i in (0, 1) for rank in range(16))
    merged = [i for _, _, i in order[: math.ceil((128 - max_batch_tokens) / 3)]]
    assert (scale_map[:, ::2, ::2] == 1).sum((1, 2)).tolist() == [merged.count(0), merged.count(1)]
    assert merged.count(1) > 0


def test_a_batch_of_several_sizes_is_cut_to_its_limit(photos: list[Tensor]) -> None:
    """Merges are the cheapest of the whole batch, by numpy."""
    images = [photos[0][:, :128, :128], photos[1][:, :96, :160], photos[2][:, :128, :128]]
    patchifier = Patchifier(16, thresholds=-1.0, max_batch_tokens=110, num_prefix_tokens=2)
    layout = patchifier(patchifier.groups(images))
    whole = sum(image[0].numel() // 256 + 2 for image in images)
    scores: dict[int, np.ndarray] = {}
    for group, of_group in patchifier.scores(images):
        scores |= dict(zip(group.index, of_group[2].numpy(), strict=True))
    limit = np.sort(np.concatenate([scores[i].ravel() for i in range(3)]))[math.ceil((whole - 110) / 3) - 1]
    for i, (rows, cols) in enumerate(layout.grid_sizes):
        np.testing.assert_array_equal(layout.scale_map[i, :rows:2, :cols:2].numpy(), scores[i] <= limit)
    assert 108 <= layout.num_tokens <= 110 and len(set(layout.seqlens)) == 3


@torch.no_grad()
def test_stochastic_depth_drops_images_of_equal_length_as_a_whole(
    make_host: Callable[..., Any], images: Tensor
) -> None:
    """The tokens of each image are those of timm's own modules, where both branches of a block are dropped or not."""
    host = make_host(drop_path_rate=0.5)
    model = aptvit.adapt(host, keep=0.5, init="nonzero").train()
    features = model.forward_features(images[:1].expand(24, -1, -1, -1))
    assert features.layout.packing.is_dense
    first, last = host.blocks  # of two blocks the first drops nothing
    x = first(model.embed(images[:1])[0].x)
    ways = []
    for attends in (0.0, 2.0):  # what is kept counts twice
        attended = x + attends * last.ls1(last.attn(last.norm1(x)))
        ways += [host.norm(attended + mixes * last.ls2(last.mlp(last.norm2(attended)))) for mixes in (0.0, 2.0)]
    distances = torch.stack(
        [torch.stack([(tokens - way[0]).abs().max() for way in ways]) for tokens in features.split()]
    )
    assert distances.min(1).values.max() < 1e-4
    assert len(distances.argmin(1).unique()) == 4


def test_a_change_in_any_cell_of_a_coarse_patch_is_read(make_host: Callable[..., Any], photo_batch: Tensor) -> None:
    """Two frames of four patches of 4 x 4 cells; the last cell of the first patch changes."""
    model = aptvit.adapt(make_host(), thresholds=(-1.0, 99.0)).eval()
    frames = photo_batch[:1].repeat(2, 1, 1, 1)
    frames[1, :, 48:64, 48:64] = 255 - frames[1, :, 48:64, 48:64]
    clip = choose_rows(model.patchifier, frames, 1.0)
    assert clip.layout.counts == [[0, 0, 4]] * 2
    assert clip.rows.tolist() == [0, 1, 2, 3, 4, 5, 6]  # all of the first frame, then a class token and a patch
    assert clip.row_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4]
