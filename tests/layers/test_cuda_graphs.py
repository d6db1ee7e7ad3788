"""CUDA graphs cannot be recorded here: a recorder that runs the function again stands in for them."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import aptvit
from aptvit.encoder.buckets import GraphedBlocks
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.layers.kernels import attention_sdpa
from aptvit.patching.layout import Packing


def run_again(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What a CUDA graph does: the same work on the same memory, into the same memory."""
    outputs = tree_map(torch.clone, run())

    def replay() -> None:
        for place, value in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
            place.copy_(value)

    return replay, outputs


def by_device_lengths(
    q: Tensor, k: Tensor, v: Tensor, queries: Packing, keys: Packing, key_bias: Tensor | None, scale: float, *_: Any
) -> Tensor:
    """Attention as a CUDA kernel does it: as the device's offsets say, no sequence longer than the maximum."""
    offsets = (packing.cu_seqlens.tolist() for packing in (queries, keys))
    out = torch.zeros_like(q)
    for (start, end), (first, last) in zip(*map(itertools.pairwise, offsets), strict=True):
        assert end - start <= queries.max_seqlen and last - first <= keys.max_seqlen
        mine, its = slice(start, end), slice(first, last)
        logits = q[:, :, mine] @ k[:, :, its].mT * scale
        logits = logits if key_bias is None else logits + key_bias[its]
        out[:, :, mine] = logits.softmax(-1) @ v[:, :, its]
    return out


def graphed(host: Any, monkeypatch: pytest.MonkeyPatch, token_bucket: int, **options: Any) -> Any:
    model = aptvit.adapt(host, **options)
    model.use_cuda_graphs(token_bucket=token_bucket)
    model.packed_encoder.graphs = GraphedBlocks(record=run_again, device_type="cpu")
    monkeypatch.setattr(attention_sdpa, "attend", by_device_lengths)
    return model


@pytest.fixture(params=["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def host(request: pytest.FixtureRequest, make_host: Callable[..., Any]) -> Any:
    return make_host(request.param, patch_size=16)


def test_a_graph_reads_new_inputs_and_keeps_old_outputs() -> None:
    graphs = BlockGraphs(record=run_again)
    first, second = torch.rand(3), torch.rand(3)
    (one, plus), (minus,) = graphs("key", lambda x: [[x * 2, x + 1], [x - 1]], first)
    (two, _), _ = graphs("key", lambda _: pytest.fail("recorded twice"), second)
    assert torch.equal(one, first * 2)
    assert torch.equal(plus, first + 1) and torch.equal(minus, first - 1)
    assert torch.equal(two, second * 2)
    assert len(graphs) == 1


def test_the_graph_unused_for_longest_makes_room() -> None:
    recorded: list[int] = []

    def run(x: Tensor) -> list[list[Tensor]]:
        recorded.append(len(x))
        return [[x + 1]]

    graphs = BlockGraphs(capacity=2, record=lambda run: (lambda: None, run()))
    for size in (1, 2, 1, 3, 1, 2):
        graphs("key", run, torch.zeros(size))
    assert recorded == [1, 2, 3, 2]
    assert len(graphs) == 2


def test_copies_and_pickles_have_no_graphs() -> None:
    graphs = BlockGraphs(capacity=3)
    graphs._graphs["key"] = ([], lambda: None, [[torch.zeros(1)]])
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert len(other) == 0
        assert other.capacity == 3


@pytest.mark.parametrize("token_bucket", [1, 64, 1024])
def test_graphed_blocks_are_the_blocks(
    host: Any, monkeypatch: pytest.MonkeyPatch, images: Tensor, token_bucket: int
) -> None:
    plain = aptvit.adapt(host, thresholds=5.5)
    with torch.no_grad():
        expected = {tau: _at(plain, tau, images) for tau in (5.5, 6.5, 7.0, -1.0)}
        lengths = {tau: _lengths_at(plain, tau, images) for tau in expected}
        equal = {tuple(one) for one in lengths.values() if len(set(one)) == 1}
        assert 0 < len(equal) < len(expected) - 1
        model = graphed(host, monkeypatch, token_bucket, thresholds=5.5)
        for tau in (*expected, *expected):
            torch.testing.assert_close(_at(model, tau, images), expected[tau], atol=2e-5, rtol=1e-4)
        assert len(model.packed_encoder.graphs) == {1: len(expected), 1024: len(equal) + 1}.get(
            token_bucket, len(model.packed_encoder.graphs)
        )


def _at(model: Any, tau: float, images: Tensor) -> Tensor:
    model.thresholds = tau
    return model(images)


def _lengths_at(model: Any, tau: float, images: Tensor) -> list[int]:
    model.thresholds = tau
    return model.layout(images).seqlens


def test_changed_weights_are_seen(host: Any, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    model = graphed(host, monkeypatch, 64, thresholds=6.5)
    with torch.no_grad():
        before = model(images)
        host.blocks[0].mlp.fc1.weight.mul_(1.5)
        after = model(images)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, aptvit.adapt(host, thresholds=6.5)(images), atol=2e-5, rtol=1e-4)
        model.double()
        assert len(model.packed_encoder.graphs) == 0


def test_training_runs_without_graphs(host: Any, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    model = graphed(host, monkeypatch, 64, thresholds=6.5).train()
    model(images).sum().backward()
    assert len(model.packed_encoder.graphs) == 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("token_bucket", [1, 64, 1024])
@pytest.mark.parametrize("area_bias", [0, 0.5])
def test_maps_and_windows_in_graphs(
    host: Any, monkeypatch: pytest.MonkeyPatch, images: Tensor, token_bucket: int, area_bias: float
) -> None:
    """Ragged and dense windows, several depths, patches that weigh more: what the blocks give one by one."""
    options: dict[str, Any] = {"thresholds": 6.5, "window_size": 2, "global_blocks": [1], "area_bias": area_bias}
    plain = aptvit.adapt(host, **options)
    with torch.no_grad():
        expected = {tau: _maps_at(plain, tau, images) for tau in (6.5, -1.0)}
        model = graphed(host, monkeypatch, token_bucket, **options)
        for tau in (6.5, -1.0, 6.5, -1.0):
            for one, other in zip(_maps_at(model, tau, images), expected[tau], strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        assert len(model.packed_encoder.graphs) == (1 if token_bucket == 1024 and not area_bias else 2)


def _maps_at(model: Any, tau: float, images: Tensor) -> list[Tensor]:
    model.thresholds = tau
    features, maps = model.forward_intermediates(images, indices=[0, 1])
    return [features.tokens, *maps]


@pytest.mark.parametrize("token_bucket", [1, 64, 1024])
@pytest.mark.parametrize("windows", [{}, {"window_size": 2, "global_blocks": [1]}], ids=["images", "windows"])
@pytest.mark.parametrize("area_bias", [0, 0.5])
def test_two_passes_in_graphs(
    host: Any, monkeypatch: pytest.MonkeyPatch, token_bucket: int, windows: dict[str, Any], area_bias: float
) -> None:
    """One graph for each pass, whatever is fine; several sizes in one batch."""
    options: dict[str, Any] = {"scorer": "preview", "thresholds": 1.0, "area_bias": area_bias, "pad": True, **windows}
    plain = aptvit.adapt(host, **options).eval()
    one_size, sizes = torch.randn(3, 3, 64, 64), [torch.randn(3, 64, 64), torch.randn(3, 96, 64)]
    with torch.no_grad():
        scores = plain.scores(one_size)[0][1][2].flatten().sort().values
        taus = [
            float(scores[rank : rank + 2].mean()) for rank in (6, 3, 5)
        ]  # between two, where rounding tells nothing
        expected = {tau: _maps_at(plain, tau, one_size) for tau in taus}
        mixed = _maps_at(plain, taus[0], sizes)
        model = graphed(host, monkeypatch, token_bucket, **options)
        for tau in (*taus, *taus):
            for one, other in zip(_maps_at(model, tau, one_size), expected[tau], strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        if token_bucket == 1024:
            assert len(model.packed_encoder.graphs) == 2
        for one, other in zip(_maps_at(model, taus[0], sizes), mixed, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_feature_maps_of_padded_sequences(host: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected = aptvit.adapt(host, thresholds=6.5).forward_intermediates(images)
        got = aptvit.adapt(host, thresholds=6.5, token_bucket=50).forward_intermediates(images)
    assert expected[0].layout.seqlens == got[0].layout.seqlens
    torch.testing.assert_close(got[0].tokens, expected[0].tokens, atol=1e-5, rtol=1e-4)
    for one, other in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_gradients_of_padded_sequences(host: Any, images: Tensor) -> None:
    grads = []
    for bucket in (None, 50):
        torch.manual_seed(1)
        model = aptvit.adapt(copy.deepcopy(host), thresholds=6.5, token_bucket=bucket).train()
        model(images).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_turning_graphs_off(host: Any) -> None:
    model = aptvit.adapt(host)
    model.use_cuda_graphs()
    assert model.token_bucket == 256
    model.use_cuda_graphs(False)
    assert model.token_bucket is None
    assert model.packed_encoder.graphs is None


def test_a_bucket_of_nothing_is_refused(host: Any) -> None:
    with pytest.raises(ValueError, match="token_bucket=0 must be at least 1"):
        aptvit.adapt(host, token_bucket=0)
    with pytest.raises(ValueError, match="token_bucket=-1 must be at least 1"):
        aptvit.adapt(host).use_cuda_graphs(token_bucket=-1)
