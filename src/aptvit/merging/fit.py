"""DTEM's recipe: train the maps that tokens are compared by, with the model frozen."""

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
    """Train the maps by which `aptvit.merging.dtem` compares tokens, and nothing else.

    AdamW on the cross-entropy, with a cosine schedule from ``lr`` to ``min_lr``. Wrap the call in ``torch.autocast``
    for mixed precision. The paper's recipe has 30 epochs of batches of 1024 images with mixup 0.8 and cutmix 1, which
    ``batches`` and ``steps`` have to provide.

    Without labels, use outputs of the unreduced model: ``(images, host(images).softmax(1))``.

    Args:
        reduced: From `aptvit.merging.dtem`; its maps are changed in place.
        batches: Pairs of images (B, C, H, W) and labels: (B,) class numbers, or (B, num_classes) probabilities.
        steps: Number of steps; ``batches`` is read repeatedly. By default its length, which it must have then.
        lr: Learning rate at the start.
        min_lr: Learning rate at the end.
        weight_decay: Weight decay of AdamW.
        clip: The norm of the gradient is clipped to this.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If the model is not from `aptvit.merging.dtem`, or there are too few batches.
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
    with _metric_training(reduced):
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
def _metric_training(reduced: ReducedTransformer) -> Iterator[None]:
    """Context with soft merging in a model that is otherwise frozen and in evaluation mode."""
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
                f"the batches ended after {done} of {steps} steps: give fewer steps, or batches that can be read again"
            )
