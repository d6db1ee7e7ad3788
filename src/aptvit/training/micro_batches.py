"""The number of images that a process runs at a time, from the measured memory of small steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from aptvit.measuring.memory import free_memory, peak_memory
from aptvit.training.data import make_loader, seeded
from aptvit.training.sampler import Draw
from aptvit.training.tasks.task import Task

__all__ = ["choose_micro_batch", "images_that_fit"]

_CPU_BUDGET = 2 * 2**30  # larger steps are no faster on a CPU
_FREE_SHARE = 0.5  # of the free memory: images differ, and allocators round up
_PROBES = 2, 4  # images of the measured steps


def choose_micro_batch(task: Task, size: int, accelerator: Any) -> tuple[int, str]:
    """Choose how many images of an update a process runs at a time, such that a training step fits into the memory.

    Args:
        task: The task, with the share of the tokens that is set.
        size: Number of images of an update on this process.
        accelerator: accelerate's Accelerator, for the device and the type to compute in.

    Returns:
        The number of images, ``size`` or a power of two; and a line about it, empty for ``size``.
    """
    few, more = _PROBES
    if min(size, len(task.images)) <= few:
        return size, ""
    numbers = range(min(more, len(task.images)))
    (batch,) = make_loader(task.images, [[Draw(i, 0) for i in numbers]], 0)
    learner, kept = task.learner(task.network), [1.0]

    def step(images: int) -> None:
        (part, *_) = batch.parts(-(-len(batch) // images))
        losses = task.losses(learner, part, accelerator)
        kept[0] = losses.kept
        losses.per_image.mean().backward()

    device = accelerator.device
    states = 3 * sum(p.numel() * p.element_size() for p in task.network.parameters())  # of the optimizer, the average
    budget = _FREE_SHARE * max(free_memory(device) - states, 0)
    budget = budget if device.type == "cuda" else min(budget, _CPU_BUDGET)
    with _unchanged(task.network, task.model):
        step(1)  # gradients are allocated once
        peaks = [peak_memory(lambda: step(few), device)]
        # A larger step would not fit, or not by much.
        peaks.append(peak_memory(lambda: step(len(batch)), device) if 2 * peaks[0] < budget else 2 * peaks[0])
    # Any image may keep all of its tokens.
    per_image = max(peaks[1] - peaks[0], 1) / max(len(batch) - few, 1) / max(kept[0], 0.1)
    fixed = max(peaks[0] - few * per_image, 0)
    number = images_that_fit(budget - fixed, per_image, size)
    if number == size:
        return size, ""
    need = (fixed + number * per_image) / 2**30
    return number, (
        f"{number} of the {size} images of an update run at a time, in at most {need:.2g} GiB; their gradients are "
        "summed (micro_batch_size sets another number)"
    )


def images_that_fit(budget: float, per_image: float, size: int) -> int:
    """Return ``size`` if that many images fit into the budget, else the largest power of two that fits, at least 1.

    Args:
        budget: Bytes for all images.
        per_image: Bytes of an image.
        size: Largest number of images.
    """
    fitting = int(budget // per_image)
    return size if fitting >= size else 1 << max(fitting.bit_length() - 1, 0)


@contextmanager
def _unchanged(network: Any, model: Any) -> Iterator[None]:
    """Context in training mode that restores buffers, gradients, random generators and counters."""
    was_training, drawn = network.training, getattr(model, "num_batches", None)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        with torch.random.fork_rng(), seeded(0):
            network.train()
            yield
    finally:
        network.zero_grad()
        network.train(was_training)
        for buffer, before in buffers:
            buffer.copy_(before)
        if drawn is not None:
            model.num_batches = drawn
