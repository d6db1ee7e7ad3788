from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from aptvit.measuring.operations import count_flops
from aptvit.merging import ToMe, parse_r, through_blocks, token_schedule, tome

Host = Callable[..., Any]
Pixels = Callable[[int], Tensor]

HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},  # class and distillation token
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 96, "num_heads": 2, "patch_size": 16},  # and registers, layer scale
    "vit_little_patch16_reg4_gap_256": {"embed_dim": 96, "num_heads": 2},  # registers only
    "vit_base_patch16_gap_224": {"embed_dim": 96, "num_heads": 2, "class_token": False},  # no prefix, mean of patches
}


def expected_logits(oracle: Any, host: Any, images: Tensor, r: list[int], prop_attn: bool) -> np.ndarray:
    vit = oracle.vit(host)

    def reduce(layer: int, x: Any, size: Any, normed: Any, attention: Any, k: Any) -> Any:
        return oracle.tome_step(x, size, k.mean(0), r[layer], vit.num_prefix)[:2]

    return np.stack([vit.run(vit.embed(image), reduce, prop_attn) for image in images.numpy()])


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("side", [80, 96])  # 25 and 36 patches: odd and even
@pytest.mark.parametrize("name", HOSTS)
def test_the_whole_forward_is_as_defined(
    make_host: Host, oracle: Any, pixels: Pixels, name: str, side: int, prop_attn: bool
) -> None:
    host = make_host(name, depth=3, img_size=side, **HOSTS[name]).double()
    images = pixels(side)
    with torch.no_grad():
        got = tome(host, r=6, prop_attn=prop_attn)(images)
    expected = expected_logits(oracle, host, images, [6] * 3, prop_attn)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-8, atol=1e-8)
    assert not np.allclose(expected, host(images).detach().numpy(), rtol=1e-3)


def test_both_attentions_differ_and_float32_follows(make_host: Host, oracle: Any, pixels: Pixels) -> None:
    host = make_host(depth=3, img_size=80)
    images = pixels(80)
    results = [expected_logits(oracle, host, images, [6] * 3, prop_attn) for prop_attn in (True, False)]
    assert not np.allclose(*results, rtol=1e-2)
    for prop_attn, expected in zip((True, False), results, strict=True):
        with torch.no_grad():
            got = tome(host, r=6, prop_attn=prop_attn)(images.float()).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("r", [[0, 5, 0], [9], (4, -1.0), (4, 0.5), 100])
def test_schedules(make_host: Host, oracle: Any, pixels: Pixels, r: Any) -> None:
    """Merging here and there, or until nothing is left to merge: 25, 13, 7 and 4 patches."""
    host = make_host(depth=3, img_size=80).double()
    images = pixels(80)
    model = tome(host, r)
    received: list[int] = []
    for block in model.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: received.append(args[0].shape[1]))
    with torch.no_grad():
        features = model.forward_features(images)
        got = model.forward_head(features)
    np.testing.assert_allclose(got, expected_logits(oracle, host, images, parse_r(3, r), True), rtol=1e-8, atol=1e-8)
    assert received == model.tokens_per_block() == model.tokens_per_block((5, 5))
    assert features.tokens.shape[1] == features.size.shape[1]
    assert features.size.sum(1).tolist() == [26.0] * 5
    if r == 100:
        assert received == [26, 14, 8] and features.tokens.shape[1] == 5


def test_images_do_not_see_each_other(make_host: Host, pixels: Pixels) -> None:
    model = tome(make_host(img_size=80).double(), r=7)
    images = pixels(80)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("prop_attn", [True, False])
def test_tokens_may_come_with_sizes(make_host: Host, oracle: Any, pixels: Pixels, prop_attn: bool) -> None:
    """As after adaptive patches: 12 tokens that stand for one patch, 8 that stand for four."""
    host = make_host(depth=3, img_size=80).double()
    vit = oracle.vit(host)
    x = torch.stack([torch.from_numpy(vit.embed(image)) for image in pixels(80).numpy()])[:, :21]
    size = torch.tensor([1.0] * 13 + [4.0] * 8).expand(5, -1)
    reduction = ToMe(parse_r(3, 5), 1, prop_attn=prop_attn)
    with torch.no_grad():
        tokens, sizes = through_blocks(host.blocks, x, reduction, size.double())
        got = host.forward_head(host.norm(tokens))
    assert sizes is not None and sizes.sum(1).tolist() == [45.0] * 5

    def reduce(layer: int, x: Any, size: Any, normed: Any, attention: Any, k: Any) -> Any:
        return oracle.tome_step(x, size, k.mean(0), 5, 1)[:2]

    for one, tokens_in, size_in in zip(got.numpy(), x.numpy(), size.double().numpy(), strict=True):
        np.testing.assert_allclose(one, vit.run(tokens_in, reduce, prop_attn, size_in), rtol=1e-8, atol=1e-8)


def test_no_mask_until_something_is_merged(make_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        masks.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    host = make_host(depth=4)
    images = torch.randn(1, 3, 128, 128)
    tome(host, [0, 3, 0, 3])(images)
    assert masks == [False, False, True, True]
    masks.clear()
    tome(host, 3, prop_attn=False)(images)
    assert masks == [False] * 4


def test_attention_pooling_counts_sizes(make_host: Host) -> None:
    """The pool over merged tokens is the pool over copies of them."""
    host = make_host("vit_base_patch16_siglip_224", embed_dim=192, num_heads=3).double()
    images = torch.randn(2, 3, 128, 128, dtype=torch.float64)
    model = tome(host, r=9)
    with torch.no_grad():
        features = model.forward_features(images)
        copies = torch.stack(
            [
                tokens.repeat_interleave(size.long(), 0)
                for tokens, size in zip(features.tokens, features.size, strict=True)
            ]
        )
        assert copies.shape[1] == 64
        torch.testing.assert_close(model.forward_head(features), host.forward_head(copies))
        plain = tome(host, r=9, prop_attn=False)
        features = plain.forward_features(images)
        torch.testing.assert_close(plain.forward_head(features), host.forward_head(features.tokens))


@pytest.mark.parametrize("global_pool", ["avg", "avgmax", "max"])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_the_mean_counts_sizes(make_host: Host, global_pool: str, with_prefix: bool) -> None:
    host = make_host("vit_little_patch16_reg4_gap_256", global_pool=global_pool, pool_include_prefix=with_prefix)
    model = tome(host, r=9)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        features = model.forward_features(images)
        copies = torch.stack(
            [
                tokens.repeat_interleave(size.long(), 0)
                for tokens, size in zip(features.tokens, features.size, strict=True)
            ]
        )
        assert copies.shape[1] == 68
        for pre_logits in (True, False):
            expected = host.forward_head(copies, pre_logits=pre_logits)
            torch.testing.assert_close(model.forward_head(features, pre_logits=pre_logits), expected)


# Schedules


def test_r_of_each_block() -> None:
    assert parse_r(4, 8) == [8, 8, 8, 8]
    assert parse_r(4, [3, 1]) == [3, 1, 0, 0]
    assert parse_r(12, (8, -1.0)) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]  # from 2 r down to 0
    assert parse_r(12, (8, 1.0)) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]
    assert parse_r(5, (8, 0.5)) == [4, 6, 8, 10, 12]
    assert parse_r(4, (5, 0.3)) == [3, 4, 5, 7]  # 3.5 and 5.67 are rounded down
    assert parse_r(3, (8, 0)) == [8, 8, 8]
    assert parse_r(1, (8, 0.5)) == [4]
    assert parse_r(2, [5, 7]) == [5, 7]


def test_published_schedules() -> None:
    """r=16 halves ViT-B's tokens after six of twelve blocks; r=8 takes MAE's ViT-L to 7, r=23 at 384 pixels to 25."""
    assert token_schedule(197, 12, 16) == [197, 181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21]
    assert token_schedule(197, 13, 16)[-1] == 11  # of 21 tokens, only 10 can go
    assert token_schedule(197, 13, 13) == [197 - 13 * i for i in range(13)]
    assert token_schedule(197, 25, 8)[-2:] == [13, 7]  # of 13 tokens, only 6 can go
    assert token_schedule(577, 25, 23) == [577 - 23 * i for i in range(25)]
    assert token_schedule(198, 13, 13, 2)[-1] == 198 - 13 * 12
    assert token_schedule(197, 5, 100) == [197, 99, 50, 26, 14]
    assert token_schedule(4, 3, 8, 4) == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "r", "published"),
    [
        ("deit_small_patch16_224", 0, 4.6),
        ("deit_small_patch16_224", 8, 3.4),
        ("deit_small_patch16_224", 13, 2.7),
        ("deit_small_patch16_224", 16, 2.3),
        ("deit_tiny_patch16_224", 8, 0.9),
        ("deit_tiny_patch16_224", 16, 0.6),
    ],
)
def test_published_operations(name: str, r: int, published: float) -> None:
    """GFLOPs of the ToMe paper: multiplications with an addition count once there, twice here."""
    model = tome(timm.create_model(name).eval(), r)
    with torch.no_grad():
        flops = count_flops(lambda: model(torch.zeros(1, 3, 224, 224)))
    assert flops / 2e9 == pytest.approx(published, abs=0.08)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "r=-1 must be .* a whole number, 0 or more"),
        ((-4, 0.5), r"r=\(-4, 0.5\) must be"),
        (2.5, "r=2.5 must be the tokens"),
        ("8", "r='8' must be"),
        ([1, -2], "0 or more"),
        ([1, 2, 3], "3 numbers for 2 blocks"),
        ((8, 1.5), r"inflect, must be in \[-1, 1\]"),
    ],
)
def test_wrong_r_is_refused(make_host: Host, r: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tome(make_host(), r)
