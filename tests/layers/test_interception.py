from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

import aptvit
from aptvit.layers.attention import packed, run_block
from aptvit.layers.interception import answered_by, answering, kind_of, num_redirected, redirect
from aptvit.patching.layout import Packing

NAMES = ("vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")


class Halves:
    """Answers with half of what PyTorch gives."""

    def answer(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs) / 2


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(16, num_heads=2).eval()


def test_attention_is_answered_inside_only() -> None:
    plain = attention()
    block = copy.deepcopy(plain)
    redirect(block)
    x = torch.randn(2, 5, 16)
    assert torch.equal(block(x), plain(x))
    with answered_by(Halves()):
        half = block(x)
        assert answering() is not None
    expected = (plain(x) - plain.proj.bias) / 2 + plain.proj.bias  # what follows attention is affine
    torch.testing.assert_close(half, expected)
    assert answering() is None
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
    with answered_by(Halves()):
        assert torch.equal(other(x), block(x))


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
            patch.setattr(packed, "__enter__", lambda _: pytest.fail("watches"))
            got = model(images)
        for block in model.adapter.blocks:
            assert num_redirected(block) == 1
            block.num_redirected = 0
        torch.testing.assert_close(model(images), got, atol=1e-6, rtol=1e-6)
    assert not any(num_redirected(block) for block in host.blocks)


def test_attention_that_was_replaced_afterwards_is_still_packed(make_host: Callable[..., Any]) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224"), thresholds=6.5)
    block: Any = model.adapter.blocks[0]
    x, packing = torch.randn(1, 6, 192), Packing.from_seqlens([2, 4])
    expected = run_block(block, x, {}, packing)
    other = Elsewhere(192, num_heads=3, qkv_bias=True).eval()
    other.load_state_dict(block.attn.state_dict())
    block.attn = other
    torch.testing.assert_close(run_block(block, x, {}, packing), expected)
    assert not num_redirected(block)  # and is not tried in vain again


class Twice(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = attention(), attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_all_attention_of_a_block_is_packed_or_all_calls_are_watched() -> None:
    block, x, packing = Twice().eval(), torch.randn(1, 6, 16), Packing.from_seqlens([2, 4])
    expected = torch.cat([block(run) for run in x.split(packing.seqlens, dim=1)], dim=1)
    redirect(block)
    assert num_redirected(block) == 2
    torch.testing.assert_close(run_block(block, x, {}, packing), expected)
    other = Elsewhere(16, num_heads=2).eval()
    other.load_state_dict(block.second.state_dict())
    block.second = other
    torch.testing.assert_close(run_block(block, x, {}, packing), expected)


def test_stochastic_depth_draws_for_each_image(make_host: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", drop_path_rate=0.9)).train()
    block, packing = model.adapter.blocks[-1], Packing.from_seqlens([3] * 40)
    assert num_redirected(block)
    x = torch.randn(1, 120, 192)
    changed = (run_block(block, x, {}, packing) != x).any(-1)[0].unflatten(0, (40, 3))
    assert torch.equal(changed.all(1), changed.any(1))
    assert 0 < int(changed.all(1).sum()) < 40
