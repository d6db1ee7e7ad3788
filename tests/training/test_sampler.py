from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aptvit.training.sampler import FILLER, BalancedBatches, distribute_by_cost


@settings(deadline=None)
@given(
    num_images=st.integers(1, 70),
    batch_size=st.integers(1, 20),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    has_costs=st.booleans(),
)
def test_each_image_comes_once_in_an_epoch(
    num_images: int, batch_size: int, world: int, epoch: int, has_costs: bool
) -> None:
    ranks = [BalancedBatches(num_images, batch_size, rank, world, seed=3) for rank in range(world)]
    for sampler in ranks:
        sampler.epoch = epoch
        if has_costs:
            sampler.store_costs(np.arange(num_images), np.random.default_rng(0).integers(1, 100, num_images))
    single = BalancedBatches(num_images, batch_size, seed=3)
    single.epoch = epoch
    updates = list(zip(*ranks, strict=True))
    assert len(updates) == len(ranks[0]) == len(single)
    for parts, whole in zip(updates, single, strict=True):
        real = [draw for part in parts for draw in part if draw != FILLER]
        assert sorted(real) == sorted(whole)  # the images and seeds of a single process
        sizes = [sum(draw != FILLER for draw in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and all(parts)
    assert sorted(draw.image for batch in single for draw in batch) == list(range(num_images))


def test_epochs_have_different_orders_and_seeds() -> None:
    sampler = BalancedBatches(50, 50, seed=1)
    (first,) = sampler
    (repeated,) = sampler
    sampler.epoch = 1
    (second,) = sampler
    assert first == repeated and {draw.image for draw in first} == {draw.image for draw in second}
    assert {draw.seed for draw in first}.isdisjoint(draw.seed for draw in second)


def test_an_interrupted_epoch_continues() -> None:
    sampler = BalancedBatches(50, 8, seed=1)
    whole = list(sampler)
    sampler.start = 3
    assert list(sampler) == whole[3:] and len(sampler) == len(whole) - 3


@pytest.mark.parametrize("world", [2, 4, 8])
def test_tokens_of_processes_are_even_within_5_percent(world: int) -> None:
    random = np.random.default_rng(0)
    for tokens in (
        random.uniform(100, 577, 8 * world),
        577 * random.beta(1, 3, 16 * world),
    ):
        loads = np.array([tokens[part].sum() for part in distribute_by_cost(tokens, world)])
        assert np.abs(loads / loads.mean() - 1).max() < 0.05
        plain = np.array([tokens[rank::world].sum() for rank in range(world)])
        assert np.ptp(loads) <= np.ptp(plain)


@given(costs=st.lists(st.integers(1, 600), min_size=1, max_size=60), world=st.integers(1, 6))
@settings(deadline=None)
def test_no_process_has_more_than_one_image_too_many(costs: list[int], world: int) -> None:
    tokens = np.array(costs, dtype=float)
    parts = distribute_by_cost(tokens, world)
    assert sorted(np.concatenate(parts)) == list(range(len(costs)))
    plain = [tokens[rank::world].sum() for rank in range(world)]
    loads = [tokens[part].sum() for part in parts]
    assert max(loads) <= max(max(plain), tokens.mean() * -(-len(costs) // world) + tokens.max())


def test_stored_costs_are_used() -> None:
    samplers = [BalancedBatches(64, 64, rank, 2) for rank in range(2)]
    costs = np.where(np.arange(64) % 2, 500, 100)
    for sampler in samplers:
        sampler.store_costs(np.arange(64), costs)
    loads = [sum(costs[draw.image] for draw in next(iter(sampler))) for sampler in samplers]
    assert loads[0] == loads[1]


def test_impossible_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no images"):
        BalancedBatches(0, 4)
    with pytest.raises(ValueError, match="rank=2 must be from 0 to 1"):
        BalancedBatches(4, 4, rank=2, world=2)
