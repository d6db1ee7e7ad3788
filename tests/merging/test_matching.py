from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptvit.merging.matching import Matching, bipartite_matching, merge


def pairs_of(matching: Matching, image: int) -> list[tuple[int, int]]:
    """(source, target) in positions of the whole sequence."""
    num_prefix = matching.num_prefix_tokens
    even, odd = num_prefix + num_prefix % 2, num_prefix + 1 - num_prefix % 2
    rows = zip(matching.source[image].tolist(), matching.target[image].tolist(), strict=True)
    return [(even + 2 * source, odd + 2 * target) for source, target in rows]


@settings(max_examples=80, deadline=None)
@given(
    num_prefix=st.integers(0, 5),
    num_patches=st.integers(2, 23),
    share=st.floats(0, 1),
    seed=st.integers(0, 10_000),
    few_directions=st.booleans(),
    sized=st.booleans(),
)
def test_matching_and_merging_are_as_defined(
    oracle: Any, num_prefix: int, num_patches: int, share: float, seed: int, few_directions: bool, sized: bool
) -> None:
    rng = np.random.default_rng(seed)
    num_tokens = num_prefix + num_patches
    r = round(share * (num_patches // 2))
    if few_directions:  # exact ties everywhere
        metric = np.eye(4)[rng.integers(0, 4, (2, num_tokens))] * rng.choice([1.0, 2.0, 4.0], (2, num_tokens, 1))
    else:
        metric = rng.normal(size=(2, num_tokens, 6))
    x = rng.normal(size=(2, num_tokens, 3))
    size = rng.choice([1.0, 4.0, 16.0], (2, num_tokens)) if sized else None

    matching = bipartite_matching(torch.from_numpy(metric), r, num_prefix)
    merged, sizes = merge(torch.from_numpy(x), None if size is None else torch.from_numpy(size), matching)
    assert merged.shape == (2, num_tokens - r, 3) and sizes.shape == (2, num_tokens - r)
    for image in range(2):
        before = None if size is None else size[image]
        expected, expected_size, pairs = oracle.tome_step(x[image], before, metric[image], r, num_prefix)
        assert pairs_of(matching, image) == pairs
        if r:
            np.testing.assert_allclose(merged[image].numpy(), expected, atol=1e-12)
            np.testing.assert_array_equal(sizes[image].numpy(), expected_size)
        else:
            # Nothing merged: what ToMe skips is here a change of order only.
            assert sorted(merged[image].flatten().tolist()) == pytest.approx(sorted(x[image].flatten()))


@settings(max_examples=40, deadline=None)
@given(num_prefix=st.integers(0, 5), num_patches=st.integers(2, 40), seed=st.integers(0, 10_000))
def test_merging_keeps_prefix_tokens_and_the_sum(num_prefix: int, num_patches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_prefix + num_patches
    x = torch.randn(3, num_tokens, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 17, (3, num_tokens), generator=generator).double()
    matching = bipartite_matching(x, num_patches // 2, num_prefix)
    merged, sizes = merge(x, size, matching)
    assert torch.equal(merged[:, :num_prefix], x[:, :num_prefix])
    assert torch.equal(sizes[:, :num_prefix], size[:, :num_prefix])
    assert torch.equal(sizes.sum(1), size.sum(1))
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), (x * size[..., None]).sum(1))


def test_the_most_similar_pairs_go_first() -> None:
    """Four pairs at known angles behind a class token, the class token nearest of all."""
    angles = torch.tensor([0.0, 0.0, 0.30, 1.5, 1.51, 3.0, 3.2, 4.5, 4.6])  # class token, then odd, even, odd, ...
    metric = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert pairs_of(bipartite_matching(metric, 3, 1), 0) == [(4, 3), (8, 7), (6, 5)]
    assert pairs_of(bipartite_matching(metric, 4, 1), 0)[3] == (2, 1)
    assert (0, 1) in pairs_of(bipartite_matching(metric, 4, 0), 0)  # without a prefix it is a token like any other


def test_among_equals_the_first_are_merged() -> None:
    metric = torch.ones(1, 9, 4)
    matching = bipartite_matching(metric, 2, 1)
    assert pairs_of(matching, 0) == [(2, 1), (4, 1)]
    assert matching.stay[0].tolist() == [2, 3]


def test_lengths_of_the_metric_do_not_matter_and_zeros_are_no_accident() -> None:
    metric = torch.randn(2, 11, 4, dtype=torch.float64)
    scaled = metric * torch.rand(2, 11, 1, dtype=torch.float64).add(0.1)
    assert torch.equal(bipartite_matching(metric, 3, 1).source, bipartite_matching(scaled, 3, 1).source)
    metric[0, 3:] = 0
    x, _ = merge(metric, None, bipartite_matching(metric, 5, 1))
    assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_matched_and_counted_in_float32(dtype: torch.dtype) -> None:
    metric = torch.randn(2, 41, 8).to(dtype)
    expected = bipartite_matching(metric.float(), 12, 1)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = bipartite_matching(metric, 12, 1)
            assert torch.equal(got.source, expected.source) and torch.equal(got.target, expected.target)
    size = torch.full((2, 41), 300.0)  # bfloat16 has no 301
    size[:, ::2] = 1
    merged, sizes = merge(metric, size, expected)
    assert merged.dtype == dtype and sizes.dtype == torch.float32
    assert sizes.sum(1).tolist() == size.sum(1).tolist()
    torch.testing.assert_close(merged, merge(metric.float(), size, expected)[0].to(dtype))


@pytest.mark.parametrize("r", [-1, 5, 100])
def test_what_cannot_be_merged_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=f"r={r} of 10 tokens cannot be merged: give 0 to 4"):
        bipartite_matching(torch.randn(1, 10, 4), r, 1)


def test_gradients_of_a_merge_are_the_weights() -> None:
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    size = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    matching = Matching(torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), torch.tensor([[0]]), 0)
    merged: Tensor = merge(x, size, matching)[0]  # tokens 2 and 4 go into token 1: 1 + 1 + 3 patches
    (gradient,) = torch.autograd.grad(merged[0, 1].sum(), x)
    assert gradient[0, :, 0].tolist() == pytest.approx([0, 0.6, 0.2, 0, 0.2, 0])
