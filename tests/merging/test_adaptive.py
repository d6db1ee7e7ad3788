"""ToMe on what adaptive patches leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aptvit
from aptvit.merging import through_blocks, tome

Host = Callable[..., Any]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_medium_patch16_reg4_gap_256"]
)
def test_without_merges_it_is_the_adaptive_model(make_host: Host, images: Tensor, name: str) -> None:
    options = {} if "tiny" in name else {"embed_dim": 64, "num_heads": 2}
    model = aptvit.adapt(make_host(name, **options), keep=0.6)
    torch.testing.assert_close(tome(model, r=0)(images), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_nothing_coarse_it_is_tome(make_host: Host, images: Tensor) -> None:
    host = make_host(depth=4)
    torch.testing.assert_close(tome(aptvit.adapt(host, keep=1.0), r=5)(images), tome(host, r=5)(images))


@torch.no_grad()
def test_both_one_after_the_other(make_host: Host, images: Tensor) -> None:
    host = make_host(depth=3)
    model = aptvit.adapt(host, keep=0.6)
    both = tome(model, r=[0, 6, 4])
    tokens, layout = model.embed(images)
    x, size = through_blocks(host.blocks, layout.packing.to_batch(tokens.x[0]), both.reduction)
    expected = host.forward_head(host.norm(x))
    torch.testing.assert_close(both(images), expected)
    length = layout.max_seqlen
    assert both.tokens_per_block((8, 8)) == [length, length, length - 6]
    assert x.shape[1] == length - 10 and size is not None and float(size.sum()) == length * len(images)


def test_lengths_that_differ_are_refused(make_host: Host) -> None:
    with pytest.raises(ValueError, match="needs images of equal length"):
        tome(aptvit.adapt(make_host(), thresholds=5.0), r=2)
    with pytest.raises(ValueError, match="cannot reduce tokens inside this model"):
        tome(aptvit.adapt(make_host("eva02_tiny_patch14_224", img_size=112), keep=0.5), r=2)
