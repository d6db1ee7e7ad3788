"""Which images a process trains on, update by update, so that all processes have as many tokens.

The slowest process decides how long an update takes. Adaptive images differ in tokens, so the images of each update are
dealt by what they cost; which images an update holds is left to chance, as it is with any sampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["FILLER", "BalancedBatches", "Draw", "deal"]


class Draw(NamedTuple):
    """An image and the seed of what is done to it."""

    image: int
    seed: int


FILLER = Draw(0, -1)
"""In place of an image, where the last batch of an epoch holds fewer images than there are processes."""


class BalancedBatches:
    """Batches of a process; each image comes once in an epoch, and each epoch has another order.

    Args:
        num_images: Of the whole epoch.
        batch_size: Of all processes together; the last batch of an epoch may be smaller.
        rank: This process.
        world: Number of processes.
        seed: Of the orders.

    Attributes:
        epoch: Set it before each epoch.
        start: Batches to leave out, where an interrupted epoch is continued.
        costs: (num_images,) tokens of each image, NaN before they are counted.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        if num_images < 1:
            raise ValueError("there are no images to train on: give at least one")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must be from 0 to {world - 1}")
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = self.start = 0
        self.costs = np.full(num_images, np.nan, dtype=np.float32)

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size) - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        seeds = np.random.default_rng([self.seed, self.epoch, 1]).integers(2**62, size=self.num_images)
        unknown = np.nanmean(self.costs) if not np.isnan(self.costs).all() else 1.0
        costs = np.where(np.isnan(self.costs), unknown, self.costs)
        for first in range(self.start * self.batch_size, self.num_images, self.batch_size):
            batch = order[first : first + self.batch_size]
            mine = batch[deal(costs[batch], self.world)[self.rank]]
            yield [Draw(int(i), int(seeds[i])) for i in mine] or [FILLER]

    def learn(self, index: np.ndarray, tokens: np.ndarray) -> None:
        """Store the tokens of images.

        Args:
            index: (n,) numbers of images.
            tokens: (n,) tokens of each.
        """
        self.costs[index] = tokens


def deal(costs: np.ndarray, world: int) -> list[np.ndarray]:
    """Distribute items among processes: numbers that differ by at most 1, costs as even as a greedy choice gets.

    The most expensive first, each to the process with the lowest cost that still has room.

    Args:
        costs: (n,) of each item.
        world: Number of processes.

    Returns:
        For each process the numbers of its items, in ascending order.
    """
    order = np.argsort(-costs, kind="stable")
    room = np.array([len(costs) // world + (rank < len(costs) % world) for rank in range(world)])
    load = np.zeros(world)
    parts: list[list[int]] = [[] for _ in range(world)]
    for item in order:
        rank = int(np.where(room > 0, load, np.inf).argmin())
        parts[rank].append(int(item))
        load[rank] += costs[item]
        room[rank] -= 1
    return [np.array(sorted(part), dtype=np.int64) for part in parts]
