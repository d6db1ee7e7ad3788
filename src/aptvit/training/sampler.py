"""Sampler that assigns the images of each update to processes such that all processes have about as many tokens.

An update takes as long as its slowest process, and images differ in their number of tokens. The images of an update are
drawn at random, as by any sampler; only their assignment to processes depends on the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["FILLER", "BalancedBatches", "Draw", "distribute_by_cost"]


class Draw(NamedTuple):
    """The number of an image, and the seed of its augmentation."""

    image: int
    seed: int


FILLER = Draw(0, -1)
"""Stands for an image without weight, if the last batch of an epoch has fewer images than there are processes."""


class BalancedBatches:
    """Batches of a process, as lists of `Draw`. Each epoch has each image once, in a different order.

    Args:
        num_images: Number of images of an epoch.
        batch_size: Number of images of an update on all processes together; the last update may have fewer.
        rank: Number of this process.
        world: Number of processes.
        seed: Seed of the orders.

    Attributes:
        epoch: Number of the epoch; set it before each epoch.
        start: Number of batches to skip at the beginning, to continue an interrupted epoch.
        costs: (num_images,) tokens of each image; NaN if they are not counted yet.

    Raises:
        ValueError: If there are no images, or the rank is out of range.
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
            members = batch[distribute_by_cost(costs[batch], self.world)[self.rank]]
            yield [Draw(int(i), int(seeds[i])) for i in members] or [FILLER]

    def store_costs(self, index: np.ndarray, tokens: np.ndarray) -> None:
        """Store the number of tokens of images.

        Args:
            index: (n,) numbers of the images.
            tokens: (n,) tokens of each image.
        """
        self.costs[index] = tokens


def distribute_by_cost(costs: np.ndarray, world: int) -> list[np.ndarray]:
    """Distribute items over processes such that their numbers differ by at most 1 and their costs are about equal.

    Greedy: in descending order of cost, each item goes to the process with the lowest total cost that is not full.

    Args:
        costs: (n,) cost of each item.
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
