"""How good are these outputs? Photo by photo, so that methods can be compared on the same photos."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["agrees", "cosine", "is_correct"]


def is_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the label is among the k highest logits; of equal logits the lower class counts as higher.

    Args:
        logits: (N, C).
        labels: (N,) class indices.
        k: How many guesses.

    Returns:
        (N,) bool.
    """
    # A sort that is stable gives the same answer on every machine, which topk does not promise for equal logits.
    guesses = logits.argsort(dim=1, descending=True, stable=True)[:, :k]  # (N, C) -> (N, k)
    return (guesses == labels[:, None]).any(1)


def agrees(logits: Tensor, reference: Tensor) -> Tensor:
    """Whether both have the same top-1. (N, C), (N, C) -> (N,) bool."""
    return is_correct(logits, reference.argsort(dim=1, descending=True, stable=True)[:, 0])


def cosine(logits: Tensor, reference: Tensor) -> Tensor:
    """Cosine between two sets of logits, photo by photo. (N, C), (N, C) -> (N,)."""
    return F.cosine_similarity(logits.double(), reference.double())
