from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from aptvit.merging import downscale

Host = Callable[..., Any]

HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_little_patch16_reg4_gap_256": {},  # positions without prefix tokens
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},
    "vit_base_patch16_siglip_224": {"embed_dim": 192, "num_heads": 3},
    "vit_base_patch16_rpn_224": {"embed_dim": 192, "num_heads": 3},  # another kind of block
}


def built_at(host: Any, name: str, size: tuple[int, int], options: dict[str, Any]) -> Any:
    """timm's own model for the size, with the host's weights and its positions resampled by timm."""
    small = timm.create_model(name, depth=2, num_classes=10, img_size=size, **options).eval()
    state = host.state_dict()
    grid = (size[0] // 16, size[1] // 16)
    prefix = 0 if host.no_embed_class else host.num_prefix_tokens
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], grid, (8, 8), num_prefix_tokens=prefix)
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("size", [64, 96, (48, 112), 160])
@pytest.mark.parametrize("name", HOSTS)
def test_it_is_timms_model_of_that_size(make_host: Host, images: Tensor, name: str, size: Any) -> None:
    host = make_host(name, **HOSTS[name])
    both = (size, size) if isinstance(size, int) else size
    small = F.interpolate(images, both, mode="bicubic", antialias=True)
    expected = built_at(host, name, both, HOSTS[name])(small)
    model = downscale(host, size)
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model(small), expected)  # images of that size are left alone
    num_tokens = host.num_prefix_tokens + both[0] * both[1] // 256
    assert model.tokens_per_block() == model.tokens_per_block((8, 8)) == [num_tokens] * 2
    assert model.forward_features(images).tokens.shape[1] == num_tokens


def test_images_may_have_any_size(make_host: Host, photos: list[Tensor]) -> None:
    model = downscale(make_host(), 64)
    photo = (photos[1][None].float() / 255 - 0.5) / 0.5
    resized = F.interpolate(photo, (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(model(photo), model(resized))
    assert model(photo.bfloat16().float()).dtype == torch.float32


def test_positions_are_still_the_hosts(make_host: Host, images: Tensor) -> None:
    host = make_host()
    before = copy.deepcopy(host.state_dict())
    expected = host(images)
    model = downscale(host, 64)
    assert model.pos_embed is host.pos_embed and model.state_dict().keys() == before.keys()
    model(images).square().sum().backward()
    assert host.pos_embed.grad.abs().sum() > 0
    assert torch.equal(host(images), expected)
    assert not host.dynamic_img_size and host.patch_embed.strict_img_size
    with torch.no_grad():
        old = model(images)
        host.pos_embed.mul_(1.5)
        assert not torch.allclose(model(images), old)


def test_the_hosts_size_is_the_host(make_host: Host, images: Tensor) -> None:
    host = make_host()
    assert torch.equal(downscale(host, 128)(images), host(images))


@pytest.mark.parametrize("size", [100, 0, -16, (64, 90), 64.5, 64.0])
def test_wrong_sizes_are_refused(make_host: Host, size: Any) -> None:
    with pytest.raises(ValueError, match="is not made of whole patches: give multiples of 16"):
        downscale(make_host(), size)


def test_other_patch_embeddings_are_refused() -> None:
    host = timm.create_model("vit_small_r26_s32_224", depth=1)
    with pytest.raises(ValueError, match="this model's patches are made by HybridEmbed"):
        downscale(host, 64)
