from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from aptvit.measuring.operations import count_flops
from aptvit.merging import evit
from aptvit.merging.evit import class_attention

Host = Callable[..., Any]
Pixels = Callable[[int], Tensor]

HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 96, "num_heads": 2, "patch_size": 16},
    "vit_base_patch16_224": {"embed_dim": 96, "num_heads": 2, "global_pool": "avg"},
}


def expected_logits(oracle: Any, host: Any, images: Tensor, keep: float, layers: list[int], fuse: bool) -> np.ndarray:
    vit = oracle.vit(host)

    def reduce(layer: int, x: Any, size: Any, normed: Any, attention: Any, k: Any) -> Any:
        share = keep if layer in layers else 1.0
        return oracle.evit_step(x, attention, share, vit.num_prefix, fuse), None

    return np.stack([vit.run(vit.embed(image), reduce, False) for image in images.numpy()])


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("side", [80, 96])
@pytest.mark.parametrize("name", HOSTS)
def test_the_whole_forward_is_as_defined(
    make_host: Host, oracle: Any, pixels: Pixels, name: str, side: int, fuse: bool
) -> None:
    host = make_host(name, depth=3, img_size=side, **HOSTS[name]).double()
    images = pixels(side)
    with torch.no_grad():
        got = evit(host, 0.6, layers=(0, 1), fuse=fuse)(images)
    expected = expected_logits(oracle, host, images, 0.6, [0, 1], fuse)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-8, atol=1e-8)
    assert not np.allclose(expected, host(images).detach().numpy(), rtol=1e-3)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.97, 0.99, 1.0])
def test_numbers_of_tokens(make_host: Host, oracle: Any, pixels: Pixels, keep: float, fuse: bool) -> None:
    """Down to one token; 0.97 of 25 is 25, which leaves all as it was."""
    host = make_host(depth=4, img_size=80).double()
    model = evit(host, keep, fuse=fuse)
    received: list[int] = []
    for block in model.blocks:
        block.norm1.register_forward_pre_hook(lambda _, args: received.append(args[0].shape[1]))
    images = pixels(80)
    with torch.no_grad():
        got = model(images)
    np.testing.assert_allclose(got, expected_logits(oracle, host, images, keep, [1, 2, 3], fuse), rtol=1e-8, atol=1e-8)
    assert received == model.tokens_per_block() == model.tokens_per_block((5, 5))
    if keep >= 0.97:
        assert received == [26] * 4
    if keep == 0.5:
        assert received == ([26, 26, 15, 9] if fuse else [26, 26, 14, 8])


def test_layers_are_in_proportion_to_the_depth(make_host: Host) -> None:
    for depth, layers in ((12, (3, 6, 9)), (24, (6, 12, 18)), (32, (8, 16, 24)), (2, (0, 1)), (1, (0,))):
        keep = evit(make_host(depth=depth, embed_dim=24), 0.7).reduction.keep
        assert keep == tuple(0.7 if layer in layers else 1.0 for layer in range(depth))


def test_published_tokens_and_operations() -> None:
    """DeiT-S in the paper: 4.6 GFLOPs become 3.0 at keep 0.7, 2.3 at 0.5. A multiplication with an addition is one."""
    host = timm.create_model("deit_small_patch16_224").eval()
    assert evit(host, 0.7).tokens_per_block() == [197] * 4 + [140] * 3 + [100] * 3 + [72] * 2
    for keep, published in ((0.7, 3.0), (0.5, 2.3)):
        with torch.no_grad():
            flops = count_flops(lambda keep=keep: evit(host, keep)(torch.zeros(1, 3, 224, 224)))
        assert flops / 2e9 == pytest.approx(published, abs=0.08)


def test_scores_are_one_row_of_attention() -> None:
    q, k = torch.randn(2, 2, 3, 11, 8).unbind()
    attention = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
    torch.testing.assert_close(class_attention(q, k), attention[:, :, 0].mean(1))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(class_attention(q, k), attention[:, :, 0].mean(1))
    assert class_attention(q.bfloat16(), k.bfloat16()).dtype == torch.float32


def test_fused_tokens_pass_gradients_to_the_scores(make_host: Host) -> None:
    """What is dropped has no gradient; what is fused has one, through its weight as well."""
    host = make_host(depth=3, img_size=80)
    images = torch.randn(2, 3, 80, 80)

    def gradient(fuse: bool) -> Tensor:
        host.zero_grad()
        evit(host, 0.4, layers=[0], fuse=fuse)(images).square().sum().backward()
        return host.blocks[0].attn.qkv.weight.grad.clone()

    assert gradient(True).isfinite().all()
    assert not torch.allclose(gradient(True), gradient(False), rtol=0.1)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
def test_wrong_keep_is_refused(make_host: Host, keep: float) -> None:
    with pytest.raises(ValueError, match="must be a share of the patch tokens"):
        evit(make_host(), keep)


@pytest.mark.parametrize("layers", [(2,), (-1,), (0, 0), ("1",), (0.5,)])
def test_wrong_layers_are_refused(make_host: Host, layers: Any) -> None:
    with pytest.raises(ValueError, match=r"different numbers of this model's blocks, from 0 to 1"):
        evit(make_host(), layers=layers)


def test_a_class_token_is_needed(make_host: Host) -> None:
    with pytest.raises(ValueError, match="class token, and this VisionTransformer has none: use aptvit"):
        evit(make_host("vit_little_patch16_reg4_gap_256"))
