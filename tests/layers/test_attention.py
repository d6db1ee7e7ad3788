from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from aptvit.layers.attention import AttentionHandler, BlockAttention, Segments
from aptvit.layers.drop_path import PackedDropPath
from aptvit.layers.kernels import attention_flash
from aptvit.layers.kernels import packed_attention as kernel
from aptvit.layers.kernels.attention_flash import Backend, available_backends
from aptvit.patching.layout import Packing

RAGGED, EQUAL = [5, 1, 9, 3], [6, 6, 6]
LENGTHS = {"ragged": RAGGED, "equal": EQUAL, "one image": [7]}
BACKENDS = available_backends()


def packed(packing: Packing, backend: Backend | None = None, key_bias: Tensor | None = None) -> AttentionHandler:
    """A handler of tokens that attend to themselves."""
    return AttentionHandler(BlockAttention(Segments(packing, packing), packing, key_bias, backend=backend))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, **options: Any) -> Tensor:
    return kernel.packed_attention(q, k, v, packing, packing, **options)


def qkv(
    tokens: int, heads: int = 4, dim: int = 8, dim_v: int | None = None, kv_heads: int | None = None
) -> list[Tensor]:
    kv_heads = kv_heads or heads
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim)]
    return [torch.randn(1, h, tokens, d, requires_grad=True) for h, d in shapes]


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, weight: Tensor | float = 1.0
) -> Tensor:
    """(H, L, d), written out, each key as often as its weight says."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    weights = (torch.einsum("hqd,hkd->hqk", q, k) * scale).exp() * weight
    return torch.einsum("hqk,hkd->hqd", weights / weights.sum(-1, keepdim=True), v)


def one_at_a_time(
    q: Tensor, k: Tensor, v: Tensor, seqlens: list[int], scale: float | None = None, key_bias: Tensor | None = None
) -> Tensor:
    outs, start = [], 0
    for length in seqlens:
        run = slice(start, start + length)
        weight = 1.0 if key_bias is None else key_bias[run].exp()
        outs.append(softmax_attention(q[0, :, run], k[0, :, run], v[0, :, run], scale, weight))
        start += length
    return torch.cat(outs, dim=1)[None]


def device_of(backend: Backend) -> tuple[str, torch.dtype, float]:
    return ("cpu", torch.float32, 1e-5) if backend == "sdpa" else ("cuda", torch.bfloat16, 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_is_one_image_at_a_time(backend: Backend, lengths: str, scale: float | None, kv_heads: int) -> None:
    device, dtype, tolerance = device_of(backend)
    seqlens = LENGTHS[lengths]
    q, k, v = (t.detach().to(device, dtype).requires_grad_() for t in qkv(sum(seqlens), kv_heads=kv_heads))
    with packed(Packing.from_seqlens(seqlens, device), backend):
        got = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=kv_heads != 4)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = one_at_a_time(*exact, seqlens, scale)
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((got.float() * direction).sum(), (q, k, v))
    for grad, one in zip(grads, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        # Half precision rounds what gradients are sums of: single elements may be off by more than that.
        assert (grad.float() - one).norm() <= tolerance * one.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dim", [8, 12])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_a_bias_makes_keys_count_more_often(backend: Backend, lengths: str, dim: int, scale: float | None) -> None:
    device, dtype, tolerance = device_of(backend)
    seqlens = LENGTHS[lengths]
    q, k, v = (t.detach().to(device, dtype).requires_grad_() for t in qkv(sum(seqlens), dim=dim))
    key_bias = torch.rand(sum(seqlens), device=device) * 2
    with packed(Packing.from_seqlens(seqlens, device), backend, key_bias):
        got = F.scaled_dot_product_attention(q, k, v, scale=scale)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = one_at_a_time(*exact, seqlens, scale, key_bias)
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((got.float() * direction).sum(), (q, k, v))
    for grad, one in zip(grads, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        assert (grad.float() - one).norm() <= tolerance * one.norm()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dim", "dim_v"), [(8, 8), (12, 12), (5, 9)])
def test_a_bias_as_one_feature_more(lengths: str, dim: int, dim_v: int) -> None:
    """How kernels of a GPU compute it."""
    seqlens = LENGTHS[lengths]
    q, k, v = qkv(sum(seqlens), dim=dim, dim_v=dim_v)
    key_bias = torch.rand(sum(seqlens)) * 2
    packing, scale = Packing.from_seqlens(seqlens), q.shape[-1] ** -0.5
    longer = attention_flash.with_bias_as_feature(q, k, v, key_bias, scale)
    got = packed_attention(*longer, packing, scale=scale)[..., :dim_v]
    expected = one_at_a_time(q, k, v, seqlens, None, key_bias)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((got * direction).sum(), (q, k, v))
    for grad, one in zip(grads, torch.autograd.grad((expected * direction).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([5, 1, 0, 7], [9, 4, 3, 7]), ([4, 4], [6, 6]), ([4, 4], [6, 9]), ([3], [8]), ([0, 2], [4, 4])],
)
def test_keys_may_have_runs_of_their_own(backend: Backend, biased: bool, queries: list[int], keys: list[int]) -> None:
    device, dtype, tolerance = device_of(backend)
    q = torch.randn(1, 4, sum(queries), 8, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, 4, sum(keys), 8, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    key_bias = torch.rand(sum(keys), device=device) * 2 if biased else None
    its = Packing.from_seqlens(keys, device)
    packing = Packing.from_seqlens(queries, device)
    got = [kernel.packed_attention(q, k, v, packing, its, key_bias, backend=backend)]
    if key_bias is not None:
        longer = attention_flash.with_bias_as_feature(q, k, v, key_bias, 8**-0.5)
        got.append(kernel.packed_attention(*longer, packing, its, None, 8**-0.5, backend=backend)[..., :8])
    runs = (packing.cu_seqlens, packing.lengths_cpu, its.cu_seqlens, its.lengths_cpu, key_bias)
    got.append(torch.ops.aptvit.packed_attention(q, k, v, *runs, 8**-0.5))  # as compiled code calls it
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    outs, bias = [], torch.zeros(sum(keys), device=device) if key_bias is None else key_bias
    parts = (exact[0].split(queries, 2), exact[1].split(keys, 2), exact[2].split(keys, 2), bias.split(keys))
    for one, its_k, its_v, its_bias in zip(*parts, strict=True):
        outs.append((one @ its_k.mT / 8**0.5 + its_bias).softmax(-1) @ its_v)
    expected = torch.cat(outs, 2)
    direction = torch.randn_like(expected)
    exact_grads = torch.autograd.grad((expected * direction).sum(), exact)
    for one in got:
        torch.testing.assert_close(one.float(), expected, atol=tolerance, rtol=tolerance)
        for grad, its_grad in zip(
            torch.autograd.grad((one.float() * direction).sum(), (q, k, v)), exact_grads, strict=True
        ):
            assert (grad.float() - its_grad).norm() <= tolerance * its_grad.norm()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_may_have_another_size_than_queries(lengths: str) -> None:
    seqlens = LENGTHS[lengths]
    q, k, v = qkv(sum(seqlens), dim=4, dim_v=10)
    with packed(Packing.from_seqlens(seqlens)):
        got = F.scaled_dot_product_attention(q, k, v)
    assert got.shape == (1, 4, sum(seqlens), 10)
    torch.testing.assert_close(got, one_at_a_time(q, k, v, seqlens))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_no_image_sees_another(lengths: str) -> None:
    """Whatever stands in the other runs, the first run's output is bit for bit the same."""
    seqlens = LENGTHS[lengths]
    q, k, v = (t.detach() for t in qkv(sum(seqlens)))
    packing = Packing.from_seqlens(seqlens)
    first = packed_attention(q, k, v, packing)[:, :, : seqlens[0]]
    for t in (q, k, v):
        t[:, :, seqlens[0] :] = 50.0
    assert torch.equal(packed_attention(q, k, v, packing)[:, :, : seqlens[0]], first)


def test_outside_the_context_attention_is_untouched() -> None:
    q, k, v = qkv(8)
    plain = F.scaled_dot_product_attention(q, k, v)
    with pytest.raises(RuntimeError, match="inside"), packed(Packing.from_seqlens([4, 4])):
        assert not torch.allclose(F.scaled_dot_product_attention(q, k, v), plain)
        raise RuntimeError("inside")
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)


def test_contexts_nest() -> None:
    q, k, v = qkv(8)
    outer, inner = Packing.from_seqlens([3, 5]), Packing.from_seqlens([8])
    with packed(outer):
        with packed(inner):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), one_at_a_time(q, k, v, [8]))
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), one_at_a_time(q, k, v, [3, 5]))


def test_dropout_acts_inside_each_run_and_can_be_repeated() -> None:
    q, k, v = qkv(sum(RAGGED))
    packing = Packing.from_seqlens(RAGGED)
    torch.manual_seed(3)
    first = packed_attention(q, k, v, packing, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(packed_attention(q, k, v, packing, dropout_p=0.5), first)
    assert not torch.allclose(packed_attention(q, k, v, packing, dropout_p=0.5), first)
    mean = torch.stack([packed_attention(q, k, v, packing, dropout_p=0.2).detach() for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, one_at_a_time(q, k, v, RAGGED).detach(), atol=0.12, rtol=0)


def test_a_wrong_number_of_tokens_is_refused() -> None:
    q, k, v = qkv(9)
    with pytest.raises(ValueError, match=r"\(1, 4, 9, 8\).*packed sequence of 8 tokens"):
        packed_attention(q, k, v, Packing.from_seqlens([3, 5]))
    with pytest.raises(ValueError, match="packed sequence of 9 tokens"):
        packed_attention(q, k[:, :, :4], v[:, :, :4], Packing.from_seqlens([4, 5]))
    with pytest.raises(ValueError, match="does not match a packed sequence"), packed(Packing.from_seqlens([4, 5])):
        F.scaled_dot_product_attention(*(t.expand(2, -1, -1, -1) for t in (q, k, v)))


def test_masks_are_refused() -> None:
    q, k, v = qkv(8)
    with packed(Packing.from_seqlens([3, 5])):
        with pytest.raises(ValueError, match="no mask"):
            F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(8, 8, dtype=torch.bool))
        with pytest.raises(ValueError, match="no mask"):
            F.scaled_dot_product_attention(q, k, v, torch.zeros(8, 8))
        with pytest.raises(ValueError, match="no mask"):
            F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'cudnn': use one of .*sdpa"):
        packed_attention(*qkv(8), Packing.from_seqlens([8]), backend="cudnn")  # type: ignore[arg-type]
    assert BACKENDS[-1] == "sdpa"


# Stochastic depth


def drop(packing: Packing, module: PackedDropPath, dim: int = 3) -> Tensor:
    with packed(packing):
        return module(torch.ones(1, packing.num_tokens, dim))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_all_tokens_of_an_image_share_its_fate(lengths: str) -> None:
    module, packing = PackedDropPath(0.4), Packing.from_seqlens(LENGTHS[lengths])
    fates = []
    for _ in range(2000):
        runs = drop(packing, module)[0].split(packing.seqlens)
        for run in runs:
            assert (run == run[0, 0]).all()
        fates.append(torch.stack([run[0, 0] for run in runs]))
    values = torch.stack(fates)  # (draws, images)
    assert values.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    kept = values > 0
    assert (kept.float().mean(0) - 0.6).abs().max() < 0.05  # 4.5 standard deviations
    if kept.shape[1] > 1:
        assert (kept[:, 0] != kept[:, 1]).float().mean() == pytest.approx(0.48, abs=0.05)  # images are independent


def test_unscaled_stochastic_depth_keeps_what_it_keeps() -> None:
    module, packing = PackedDropPath(0.5, scale_by_keep=False), Packing.from_seqlens([2] * 50)
    assert set(drop(packing, module).unique().tolist()) == {0.0, 1.0}


def test_stochastic_depth_of_one_drops_everything() -> None:
    assert (drop(Packing.from_seqlens([2, 3]), PackedDropPath(1.0)) == 0).all()


def test_stochastic_depth_is_the_identity_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(1, 5, 3)
    with packed(Packing.from_seqlens([2, 3])):
        assert PackedDropPath(0.9).eval()(x) is x
        assert PackedDropPath(0.0)(x) is x


# Compiled


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dim_v", [8, 6])
def test_the_compiled_operator_is_the_eager_function(lengths: str, dim_v: int, biased: bool) -> None:
    packing = Packing.from_seqlens(LENGTHS[lengths])
    q, k, v = qkv(packing.num_tokens, dim_v=dim_v)
    key_bias = torch.rand(packing.num_tokens) if biased else None
    runs = (packing.cu_seqlens, packing.lengths_cpu, None, None, key_bias)
    got = torch.ops.aptvit.packed_attention(q, k, v, *runs, 0.6)
    expected = one_at_a_time(q, k, v, packing.seqlens, 0.6, key_bias)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((got * direction).sum(), (q, k, v))
    for grad, one in zip(grads, torch.autograd.grad((expected * direction).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, one)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_compiled_operator_keeps_its_promises(lengths: str, beside: bool, biased: bool) -> None:
    packing = keys = Packing.from_seqlens(LENGTHS[lengths])
    if beside:
        keys = Packing.from_seqlens([length + 2 for length in packing.seqlens])
    q, _, _ = qkv(packing.num_tokens, heads=2, dim=4, dim_v=6)
    _, k, v = qkv(keys.num_tokens, heads=2, dim=4, dim_v=6)
    key_bias = torch.rand(keys.num_tokens) if biased else None
    its = (keys.cu_seqlens, keys.lengths_cpu) if beside else (None, None)
    arguments = (q, k, v, packing.cu_seqlens, packing.lengths_cpu, *its, key_bias, 0.5)
    torch.library.opcheck(torch.ops.aptvit.packed_attention, arguments)
    # As hosts have them: heads cut out of one (1, T, 3 H d) projection.
    cut = torch.randn(1, packing.num_tokens, 3, 2, 4, requires_grad=True).permute(2, 0, 3, 1, 4).unbind(0)
    its_q, *its_keys = (t.detach().requires_grad_() for t in cut)
    given = (its_q, *((k, v) if beside else its_keys), *arguments[3:])
    torch.library.opcheck(torch.ops.aptvit.packed_attention, given)
    # The backward operator, which opcheck cannot look into: memory as its shape function promises it.
    grad = torch.randn(1, 2, packing.num_tokens, 6)
    inputs = (grad, *(t.detach() for t in arguments[:3]), *arguments[3:])
    real = torch.ops.aptvit.packed_attention_backward(*inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in inputs]
        promised = torch.ops.aptvit.packed_attention_backward(*fakes)
    for one, other in zip(real, promised, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_one_graph_serves_all_lengths(kv_heads: int) -> None:
    """One more serves single images: torch.compile treats sizes of one as constants."""
    counter = CompileCounter()
    torch.compiler.reset()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q * 2, k, v, enable_gqa=kv_heads != 6) + 1

    # No number of images equals the number of heads: torch.compile takes equal sizes for one size.
    for seqlens, graphs in (([5, 1, 9], 1), ([4, 4, 4, 4], 1), ([2, 30], 1), ([11], 2), ([3, 6, 4], 2)):
        q, k, v = qkv(sum(seqlens), heads=6, kv_heads=kv_heads)
        with packed(Packing.from_seqlens(seqlens)):
            got = attend(q, k, v)
        torch.testing.assert_close(got, one_at_a_time(q * 2, k, v, seqlens) + 1)
        assert 1 <= counter.frame_count <= graphs
    torch.compiler.reset()


def test_gradients_flow_through_a_compiled_graph() -> None:
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3).square()

    compiled: Callable[..., Tensor] = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlens in (RAGGED, [2, 3, 4]):
        q, k, v = qkv(sum(seqlens))
        with packed(Packing.from_seqlens(seqlens)):
            got = compiled(q, k, v)
        grads = torch.autograd.grad(got.sum(), (q, k, v))
        expected = one_at_a_time(q, k, v, seqlens, 0.3).square().sum()
        for grad, one in zip(grads, torch.autograd.grad(expected, (q, k, v)), strict=True):
            torch.testing.assert_close(grad, one)
    torch.compiler.reset()
