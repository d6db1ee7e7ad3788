from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

import aptvit
from aptvit.layers.attention import (
    AttentionHandler,
    BlockAttention,
    Segments,
    class_of,
    current_handler,
    redirect,
    run_block,
)
from aptvit.patching.layout import Packing

NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")


def of_packing(seqlens: list[int]) -> BlockAttention:
    """Tokens that attend to themselves."""
    packing = Packing.from_seqlens(seqlens)
    return BlockAttention(Segments(packing, packing), packing)


def num_redirected(block: nn.Module) -> int:
    return getattr(block, "num_redirected", 0)


class Alone(nn.Module):
    """A block of one attention."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        self.handler = current_handler()
        return self.attn(x)


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(16, num_heads=2).eval()


def test_attention_is_answered_inside_only() -> None:
    plain = attention()
    block = Alone(copy.deepcopy(plain))
    redirect(block)
    x = torch.randn(1, 6, 16)
    assert torch.equal(block(x), plain(x)) and block.handler is None
    (got,) = run_block(block, x, {}, of_packing([2, 4]))
    assert block.handler is not None and block.handler.calls == 1
    torch.testing.assert_close(got, torch.cat([plain(part) for part in x.split([2, 4], dim=1)], dim=1))
    assert (got - plain(x)).abs().max() > 1e-3
    assert current_handler() is None
    assert torch.equal(block(x), plain(x))


def test_it_is_the_same_module_to_everyone_else() -> None:
    plain = attention()
    block = copy.deepcopy(plain)
    redirect(block)
    assert isinstance(block, Attention)
    assert class_of(block) is class_of(plain) is Attention
    assert repr(block) == repr(plain)
    assert list(block.state_dict()) == list(plain.state_dict())
    assert type(plain) is Attention
    kind = type(block)
    redirect(block)
    assert type(block) is kind


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_are_redirected(again: Callable[[nn.Module], nn.Module]) -> None:
    block = attention()
    redirect(block)
    other = again(block)
    assert num_redirected(other) == 1
    x = torch.randn(1, 3, 16)
    assert torch.equal(other(x), block(x))
    parts = of_packing([1, 2])
    assert torch.equal(run_block(other, x, {}, parts)[0], run_block(block, x, {}, parts)[0])
    assert num_redirected(other) == 1 and not torch.allclose(run_block(other, x, {}, parts)[0], other(x))


class Elsewhere(Attention):
    """Attends through a function of its own."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return Attention.forward(self, x, **options)


def test_what_attends_by_another_name_is_left_alone() -> None:
    module = Elsewhere(16, num_heads=2)
    redirect(module)
    assert type(module) is Elsewhere
    assert not num_redirected(module)
    assert not num_redirected(nn.Linear(2, 2))


@pytest.mark.parametrize("name", NAMES)
def test_adapted_blocks_are_not_watched(
    name: str, make_host: Callable[..., Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watching each call of PyTorch gives the same answer, and is not what happens."""
    host = make_host(name, patch_size=16)
    model = aptvit.adapt(host, thresholds=6.5)
    with torch.no_grad():
        assert not model.layout(images).packing.is_dense
        with monkeypatch.context() as patch:
            patch.setattr(AttentionHandler, "__enter__", lambda _: pytest.fail("watches"))
            got = model(images)
        for block in model.adapter.blocks:
            assert num_redirected(block) == 1
            block.num_redirected = 0
        torch.testing.assert_close(model(images), got, atol=1e-6, rtol=1e-6)
    assert not any(num_redirected(block) for block in host.blocks)


def test_attention_that_was_replaced_afterwards_is_still_packed(make_host: Callable[..., Any]) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224"), thresholds=6.5)
    block: Any = model.adapter.blocks[0]
    x, packing = torch.randn(1, 6, 192), of_packing([2, 4])
    (expected,) = run_block(block, x, {}, packing)
    other = Elsewhere(192, num_heads=3, qkv_bias=True).eval()
    other.load_state_dict(block.attn.state_dict())
    block.attn = other
    torch.testing.assert_close(run_block(block, x, {}, packing)[0], expected)
    assert not num_redirected(block)  # and is not tried in vain again


class Twice(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = attention(), attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_all_attention_of_a_block_is_packed_or_all_calls_are_watched() -> None:
    block, x, packing = Twice().eval(), torch.randn(1, 6, 16), of_packing([2, 4])
    expected = torch.cat([block(run) for run in x.split([2, 4], dim=1)], dim=1)
    redirect(block)
    assert num_redirected(block) == 2
    torch.testing.assert_close(run_block(block, x, {}, packing)[0], expected)
    other = Elsewhere(16, num_heads=2).eval()
    other.load_state_dict(block.second.state_dict())
    block.second = other
    torch.testing.assert_close(run_block(block, x, {}, packing)[0], expected)


def test_stochastic_depth_draws_for_each_image(make_host: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", drop_path_rate=0.9)).train()
    block, packing = model.adapter.blocks[-1], of_packing([3] * 40)
    assert num_redirected(block)
    x = torch.randn(1, 120, 192)
    changed = (run_block(block, x, {}, packing)[0] != x).any(-1)[0].unflatten(0, (40, 3))
    assert torch.equal(changed.all(1), changed.any(1))
    assert 0 < int(changed.all(1).sum()) < 40
