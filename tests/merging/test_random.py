from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

from aptvit.merging import random

Host = Callable[..., Any]


def embedded(host: Any, images: Tensor) -> Tensor:
    """What the host's first block reads."""
    return host.norm_pre(host._pos_embed(host.patch_embed(images)))


def chosen(model: Any, host: Any, images: Tensor) -> list[list[int]]:
    """For each image, the patch of each token that the first block of the model reads."""
    received: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    with torch.no_grad():
        model(images)
        everything = embedded(host, images)
    handle.remove()
    num_prefix = host.num_prefix_tokens
    assert torch.equal(received[0][:, :num_prefix], everything[:, :num_prefix])
    result = []
    for tokens, patches in zip(received[0][:, num_prefix:], everything[:, num_prefix:], strict=True):
        same = (tokens[:, None] == patches[None]).all(-1)
        assert (same.sum(1) == 1).all()
        result.append(same.int().argmax(1).tolist())
    return result


def of_host(host: Any, images: Tensor, subsets: list[list[int]]) -> Tensor:
    """Logits of timm's own parts, run on these patches of each image."""
    num_prefix = host.num_prefix_tokens
    rows = torch.tensor([[*range(num_prefix), *(num_prefix + i for i in patches)] for patches in subsets])
    x = embedded(host, images)
    x = torch.stack([tokens[kept] for tokens, kept in zip(x, rows, strict=True)])
    return host.forward_head(host.norm(host.blocks(x)))


NAMES = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_little_patch16_reg4_gap_256"]


@pytest.mark.parametrize("name", NAMES)
def test_the_host_runs_on_a_random_part(make_host: Host, images: Tensor, name: str) -> None:
    host = make_host(name)
    subsets = chosen(random(host, 0.3, seed=5), host, images)
    assert all(len(one) == len(set(one)) == round(0.3 * 64) and one == sorted(one) for one in subsets)
    assert len({tuple(one) for one in subsets}) == 5  # each image its own
    model = random(host, 0.3, seed=5)
    assert model.tokens_per_block() == [host.num_prefix_tokens + 19] * 2
    with torch.no_grad():
        torch.testing.assert_close(model(images), of_host(host, images, subsets))


def test_same_seed_and_order_same_choice(make_host: Host, images: Tensor) -> None:
    host = make_host(depth=1)
    first, second = random(host, 0.5, seed=3), random(host, 0.5, seed=3)
    state = torch.get_rng_state()
    draws = [chosen(first, host, images) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers change
    torch.manual_seed(99)
    assert draws == [chosen(second, host, images) for _ in range(3)]
    assert draws[0] != draws[1] != draws[2]
    first.num_batches = 0
    assert chosen(copy.deepcopy(first), host, images) == draws[0]
    assert chosen(first.train(), host, images) == draws[0]
    others = [chosen(random(host, 0.5, seed=seed), host, images) for seed in (0, 2, 4)]
    assert all(one not in draws for one in others)


def test_every_patch_is_as_likely(make_host: Host) -> None:
    """2000 images keep 16 of 64: each patch 500 times, give or take five standard deviations (19)."""
    host = make_host(depth=1, embed_dim=12, img_size=128)
    model = random(host, 0.25)
    model.blocks[0] = torch.nn.Identity()
    count = torch.zeros(64)
    for _ in range(4):
        for one in chosen_of(model, host, torch.randn(1, 3, 128, 128).expand(500, -1, -1, -1)):
            count[one] += 1
    assert count.sum() == 2000 * 16
    assert (count - 500).abs().max() < 97


def chosen_of(model: Any, host: Any, images: Tensor) -> list[list[int]]:
    """As `chosen`, for copies of one image."""
    with torch.no_grad():
        everything = embedded(host, images[:1])[0, 1:, 0]
        tokens = model._embed(images)[:, 1:, 0]
    assert len(everything.unique()) == 64
    return (tokens[..., None] == everything).int().argmax(-1).tolist()


def test_gradients_are_those_of_the_host_on_the_chosen_patches(make_host: Host, images: Tensor) -> None:
    host = make_host()
    subsets = chosen(random(host, 0.5, seed=5), host, images)
    grads = []
    for logits in (random(host, 0.5, seed=5).train()(images), of_host(host, images, subsets)):
        host.zero_grad()
        logits.square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in host.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.any()
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize(("keep", "kept"), [(0.001, 1), (0.5, 32), (0.995, 64), (1.0, 64)])
def test_shares(make_host: Host, images: Tensor, keep: float, kept: int) -> None:
    host = make_host()
    model = random(host, keep)
    assert model.tokens_per_block() == [1 + kept] * 2
    assert model.tokens_per_block((2, 3)) == [1 + max(1, round(6 * keep))] * 2
    subsets = chosen(random(host, keep), host, images)
    assert all(len(patches) == kept and patches == sorted(set(patches)) for patches in subsets)
    with torch.no_grad():
        if kept == 64:
            assert torch.equal(model(images), host(images))
        else:
            torch.testing.assert_close(model(images), of_host(host, images, subsets))


def test_any_block_will_do(make_host: Host, images: Tensor) -> None:
    host = make_host("vit_base_patch16_rpn_224", embed_dim=192, num_heads=3)
    assert type(host.blocks[0]) is ResPostBlock
    subsets = chosen(random(host, 0.5), host, images)
    with torch.no_grad():
        torch.testing.assert_close(random(host, 0.5)(images), of_host(host, images, subsets))


@pytest.mark.parametrize("keep", [0, 1.5, -1, float("nan")])
def test_wrong_shares_are_refused(make_host: Host, keep: float) -> None:
    with pytest.raises(ValueError, match=r"must be a share of the patch tokens in \(0, 1\]"):
        random(make_host(), keep)
