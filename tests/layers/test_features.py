from __future__ import annotations

import pytest
import torch

from aptvit.patching.features import PackedFeatures
from aptvit.patching.layout import PatchLayout

DIM = 5


def features_of(kind: str, prefix: int) -> PackedFeatures:
    if kind == "equal":
        scale_map = torch.zeros(3, 4, 6, dtype=torch.int8)
        scale_map[:, :2, 2:4] = 1
        grids = None
    elif kind == "ragged":
        scale_map = torch.zeros(3, 4, 6, dtype=torch.int8)
        scale_map[0, :, :4] = 2
        scale_map[2, 2:, 4:] = 1
        grids = None
    else:
        scale_map = torch.full((3, 4, 6), -1, dtype=torch.int8)
        scale_map[0, :2] = 1
        scale_map[1, :, :3] = 0
        scale_map[2] = 0
        scale_map[2, :4, :4] = 2
        grids = [(2, 6), (4, 3), (4, 6)]
    layout = PatchLayout.from_scale_map(scale_map, 16, 3, prefix, grids)
    return PackedFeatures(torch.randn(layout.num_tokens, DIM), layout)


KINDS = ["equal", "ragged", "mixed"]
PREFIXES = [0, 1, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_split_cuts_where_images_end(kind: str, prefix: int) -> None:
    features = features_of(kind, prefix)
    start = 0
    for image, tokens in enumerate(features.split()):
        length = prefix + len(features.layout.patches(image))
        assert torch.equal(tokens, features.tokens[start : start + length])
        start += length
    assert start == len(features.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_is_the_front_of_each_image(kind: str, prefix: int) -> None:
    features = features_of(kind, prefix)
    got = features.prefix()
    assert got.shape == (3, prefix, DIM)
    for one, tokens in zip(got, features.split(), strict=True):
        assert torch.equal(one, tokens[:prefix])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("include_prefix", [True, False])
def test_padded_has_one_row_per_image(kind: str, prefix: int, include_prefix: bool) -> None:
    features = features_of(kind, prefix)
    tokens, valid = features.padded(include_prefix)
    assert (valid is None) == (kind == "equal")
    start = 0 if include_prefix else prefix
    longest = max(len(one) for one in features.split()) - start
    assert tokens.shape == (3, longest, DIM)
    for image, one in enumerate(features.split()):
        length = len(one) - start
        assert torch.equal(tokens[image, :length], one[start:])
        if valid is not None:
            assert valid[image].tolist() == [True] * length + [False] * (longest - length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_feature_maps_show_each_token_at_every_cell_it_covers(kind: str, prefix: int) -> None:
    features = features_of(kind, prefix)
    maps = features.feature_maps()
    assert isinstance(maps, list) == (kind == "mixed")
    for image, (tokens, grid) in enumerate(zip(features.split(), features.layout.grid_sizes, strict=True)):
        expected = torch.full((DIM, *grid), float("nan"))
        for token, (y, x, side) in zip(tokens[prefix:], features.layout.patches(image).tolist(), strict=True):
            expected[:, y // 16 : (y + side) // 16, x // 16 : (x + side) // 16] = token[:, None, None]
        assert torch.equal(maps[image], expected)
        assert maps[image].is_contiguous()


def test_gradients_reach_every_token_as_often_as_it_is_shown() -> None:
    features = features_of("ragged", 1)
    features.tokens.requires_grad_()
    maps = features.feature_maps()
    assert isinstance(maps, torch.Tensor)
    maps.sum().backward()
    assert features.tokens.grad is not None
    shown = 4**features.layout.scale
    assert torch.equal(features.tokens.grad[features.layout.patch_index, 0], shown.float())
    assert features.tokens.grad.sum() == DIM * 3 * 4 * 6
