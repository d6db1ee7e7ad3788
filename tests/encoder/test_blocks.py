"""How much a patch weighs in attention, beside the host's own blocks on as many copies of each token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aptvit
from aptvit.export.graphs import WholePath

Host = Callable[..., Any]
HOSTS = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_medium_patch16_reg4_gap_256")
THRESHOLDS = (6.5, 6.5)


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest, make_host: Host) -> Any:
    return make_host(request.param, patch_size=16, embed_dim=96, num_heads=2)


def copies(model: Any, images: Tensor) -> Tensor:
    """(T, D): one image through the host's own blocks, each token there once for each base patch that it covers."""
    tokens, layout = model.embed(images)
    x, rotation = tokens.x, tokens.rotation
    area = torch.ones(layout.num_tokens, dtype=torch.long)
    area[layout.patch_index] = 4**layout.scale
    source = torch.arange(layout.num_tokens).repeat_interleave(area)
    x, turned = x[:, source], None if rotation is None else rotation.globally.index_select(-2, source)
    arguments = model.adapter.block_arguments(turned)
    for block, its in zip(model.adapter.blocks, arguments, strict=True):
        x = block(x, **its)
    return model.adapter.norm(x)[0, area.cumsum(0) - area]


@torch.no_grad()
def test_at_one_a_patch_weighs_as_much_as_those_it_replaces(host: Any, images: Tensor) -> None:
    model = aptvit.adapt(host, thresholds=THRESHOLDS, init="nonzero", area_bias=1)
    joint = model.forward_features(images)
    assert len(set(joint.layout.seqlens)) > 1
    for mine, image in zip(joint.tokens.split(joint.layout.seqlens), images, strict=True):
        expected = copies(model, image[None])
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.forward_features(image[None]).tokens, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_of_equal_length(host: Any, images: Tensor) -> None:
    model = aptvit.adapt(host, keep=0.5, scales=2, init="nonzero", area_bias=1)
    joint = model.forward_features(images)
    assert joint.layout.packing.is_dense
    for mine, image in zip(joint.tokens.split(joint.layout.seqlens), images, strict=True):
        torch.testing.assert_close(mine, copies(model, image[None]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inside_windows(make_host: Host, images: Tensor) -> None:
    """Windows that hold whole images are images."""
    host = make_host("eva02_tiny_patch14_224", patch_size=16, class_token=False, global_pool="avg")
    model = aptvit.adapt(host, thresholds=THRESHOLDS, area_bias=1, window_size=8, global_blocks=[1])
    assert not model.layout(images).is_uniform
    for image in images:
        expected = copies(aptvit.adapt(host, thresholds=THRESHOLDS), image[None])
        torch.testing.assert_close(model.forward_features(image[None]).tokens, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_can_be_set_and_is_nothing_where_nothing_is_merged(host: Any, images: Tensor) -> None:
    model = aptvit.adapt(host, thresholds=THRESHOLDS)
    without = model(images)
    model.area_bias = 0.5
    assert not torch.allclose(model(images), without)
    model.area_bias = 0
    assert torch.equal(model(images), without)
    model.thresholds, model.area_bias = (-1.0, -1.0), 0.5
    assert torch.equal(model(images), aptvit.adapt(host)(images))


def test_gradients_of_the_host(host: Any, images: Tensor) -> None:
    """Those of a batch, compiled and filled up to a bucket, are those of its images beside copies of tokens."""
    torch.compiler.reset()
    results = []
    for bucket, compiled in ((None, False), (64, False), (None, True)):
        model = aptvit.adapt(copy.deepcopy(host), thresholds=THRESHOLDS, area_bias=1, token_bucket=bucket).train()
        if compiled:
            model.compile(backend="aot_eager")
        tokens = model.forward_features(images).tokens
        tokens.square().sum().backward()
        results.append([tokens.detach(), *(p.grad for p in model.adapter.blocks.parameters())])
    torch.compiler.reset()
    beside = aptvit.adapt(copy.deepcopy(host), thresholds=THRESHOLDS).train()
    tokens = torch.cat([copies(beside, image[None]) for image in images])
    tokens.square().sum().backward()
    expected = [tokens.detach(), *(p.grad for p in beside.adapter.blocks.parameters())]
    for got in results:
        for one, other in zip(got, expected, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm()


@torch.no_grad()
def test_saved_copied_and_in_a_clip(host: Any, images: Tensor, tmp_path: Path) -> None:
    model = aptvit.adapt(host, thresholds=THRESHOLDS, area_bias=0.5)
    expected = model(images)
    model.save_pretrained(tmp_path)
    loaded = aptvit.from_pretrained(tmp_path)
    assert loaded.area_bias == 0.5
    for one in (loaded, copy.deepcopy(model)):
        assert torch.equal(one(images), expected)
    torch.testing.assert_close(model.forward_video(images, tolerance=-1.0), expected, rtol=1e-4, atol=1e-4)


def test_bad_values_and_what_has_no_weights_are_named(make_host: Host) -> None:
    for value in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"area_bias={value} must be"):
            aptvit.adapt(make_host(), area_bias=value)
    with pytest.raises(ValueError, match=r"without area_bias=0\.5"):
        aptvit.merging.tome(aptvit.adapt(make_host(), keep=0.5, area_bias=0.5), r=2)
    with pytest.raises(ValueError, match=r"area_bias=0\.5 has no graph"):
        WholePath(aptvit.adapt(make_host(), thresholds=5.0, area_bias=0.5), (128, 128))
