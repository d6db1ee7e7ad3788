"""The same share for every baseline, and errors that name the setting of each."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch

import aptvit.merging
from aptvit.merging import downscale, dtem, evit, random, resize, tome

Host = Callable[..., Any]
METHODS: list[Callable[..., Any]] = [tome, dtem, evit, random, downscale, resize]


def entering(model: Any, images: torch.Tensor, blocks: Any) -> list[int]:
    """Tokens that enter each block, as a forward pass has them."""
    counted: list[int] = []
    hooks = [block.mlp.register_forward_pre_hook(lambda _, x: counted.append(0)) for block in blocks]
    hooks += [block.attn.register_forward_pre_hook(lambda _, x: None) for block in blocks]
    hooks += [
        block.norm1.register_forward_hook(lambda _, x, out: counted.append(out.numel() // out.shape[-1]))
        for block in blocks
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return [number // len(images) for number in counted if number]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.75, 0.5, 1.0])
def test_keep_is_the_mean_share_over_the_blocks(make_host: Host, method: Callable[..., Any], keep: float) -> None:
    host = make_host(img_size=160, depth=6)
    model = method(host, keep=keep).eval()
    inner = getattr(model, "vit", None) or model.adapter.vit
    tokens = entering(model, torch.randn(2, 3, 160, 160), inner.blocks)
    assert len(tokens) == 6
    assert fmean(tokens) - 1 == pytest.approx(100 * keep, abs=7)  # a side of 112 pixels is 49 patches
    if keep == 1:
        assert tokens == [101] * 6


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_others_are_refused_by_the_name_of_its_own(make_host: Host, method: Callable[..., Any]) -> None:
    own = {"tome": "r", "dtem": "r", "evit": "rate", "random": "keep", "downscale": "size", "resize": "thresholds"}
    name = method.__name__
    for other in {"r", "rate", "size", "thresholds"} - {own[name]}:
        with pytest.raises(ValueError, match=rf"merging\.{name} has no {other}=13: its own setting is {own[name]}="):
            method(make_host(), **{other: 13})


@pytest.mark.parametrize(("method", "options"), [(tome, {"r": 3}), (dtem, {"r": 3}), (evit, {"rate": 0.5})])
def test_a_setting_and_a_share_are_refused(make_host: Host, method: Callable[..., Any], options: Any) -> None:
    with pytest.raises(ValueError, match=r"or keep=0\.5, not both"):
        method(make_host(), keep=0.5, **options)


def test_what_is_out_of_range_or_missing_is_refused(make_host: Host) -> None:
    for method in (tome, dtem, evit, random, downscale, resize):
        for keep in (0.0, 1.5):
            with pytest.raises(ValueError, match=f"keep={keep} must be a share of the patch tokens"):
                method(make_host(), keep=keep)
    with pytest.raises(ValueError, match="give size=, or keep="):
        downscale(make_host())
    with pytest.raises(ValueError, match="is of a uniform model"):
        tome(aptvit.adapt(make_host(), keep=0.8), keep=0.5)
