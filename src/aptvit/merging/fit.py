"""DTEM's own recipe: the maps that tokens are compared by are trained, the model stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.merging.dtem import DTEM
from aptvit.merging.reduced import ReducedTransformer

__all__ = ["fit_dtem"]

Batches = Iterable[tuple[Tensor, Tensor]]


def fit_dtem(
    reduced: nn.Module,
    batches: Batches,
    *,
    steps: int | None = None,
    lr: float = 1e-4,
    min_lr: float = 1e-6,
    weight_decay: float = 1e-4,
    clip: float = 5.0,
) -> list[float]:
    """Train what `aptvit.merging.dtem` compares tokens by, and nothing else.

    AdamW on the cross-entropy, under a cosine schedule from ``lr`` to ``min_lr``. Wrap the call in ``torch.autocast``
    for mixed precision. The recipe's 30 epochs at 1024 images a step with mixup 0.8 and cutmix 1 are up to ``batches``
    and ``steps``.

    Without labels, give what the unreduced model says: ``(images, host(images).softmax(1))``.

    Args:
        reduced: From `aptvit.merging.dtem`; its metric is changed in place.
        batches: Pairs of images (B, C, H, W) and labels: (B,) class numbers, or (B, num_classes) probabilities.
        steps: Batches to train on; ``batches`` is read again from the start when it ends. By default each batch once,
            for which it must have a length.
        lr: Learning rate at the start.
        min_lr: Learning rate at the end.
        weight_decay: Weight decay of AdamW.
        clip: The norm of the gradient is clipped to this.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If the model is not DTEM's, or there are too few batches.
    """
    if not isinstance(reduced, ReducedTransformer) or not isinstance(reduced.reduction, DTEM):
        raise ValueError(f"a {type(reduced).__name__} has no metric to train: give what aptvit.merging.dtem returned")
    if steps is None:
        if not isinstance(batches, Sized):
            raise ValueError("the learning rate needs to know how many batches there are: give steps")
        steps = len(batches)
    if steps < 1:
        raise ValueError(f"{steps} steps train nothing: give at least one batch")
    parameters = list(reduced.reduction.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=min_lr)
    losses = []
    with _only_the_metric_trains(reduced):
        for images, labels in _repeat(batches, steps):
            device = parameters[0].device
            logits = reduced(images.to(device, non_blocking=True))
            loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())  # read at the end: reading waits for the device
    optimizer.zero_grad()
    return torch.stack(losses).tolist()


@contextmanager
def _only_the_metric_trains(reduced: ReducedTransformer) -> Iterator[None]:
    """Soft merging in a model that is otherwise as in evaluation and frozen; afterwards all is as it was."""
    metric = set(reduced.reduction.parameters())
    states = [(parameter, parameter.requires_grad) for parameter in reduced.parameters()]
    mode = reduced.training
    try:
        for parameter, _ in states:
            parameter.requires_grad_(parameter in metric)
        reduced.eval()
        reduced.reduction.train()
        yield
    finally:
        for parameter, requires_grad in states:
            parameter.requires_grad_(requires_grad)
        reduced.train(mode)


def _repeat(batches: Batches, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise ValueError(
                f"the batches ended after {done} of {steps} steps: give fewer steps, or what can be read again"
            )
