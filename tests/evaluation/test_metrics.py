"""Right, the same, alike: against numpy."""

from __future__ import annotations

import numpy as np
import torch

from aptvit.evaluation.metrics import agrees, cosine, is_correct


def test_correct_answers_are_those_of_a_sorted_list() -> None:
    logits, labels = torch.randn(200, 12), torch.randint(12, (200,))
    for k in (1, 5, 12, 50):
        ranks = np.argsort(-logits.numpy(), axis=1)[:, :k]
        expected = [label in row for row, label in zip(ranks, labels.numpy(), strict=True)]
        assert is_correct(logits, labels, k).tolist() == expected


def test_equal_logits_name_the_lower_class() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0]])
    assert is_correct(logits, torch.tensor([0])).tolist() == [True]
    assert is_correct(logits, torch.tensor([1])).tolist() == [False]


def test_agreement_is_of_the_first_answer() -> None:
    one, other = torch.randn(100, 7), torch.randn(100, 7)
    expected = one.numpy().argmax(1) == other.numpy().argmax(1)
    assert agrees(one, other).numpy().tolist() == expected.tolist()
    assert agrees(one, 3 * one + 1).all()


def test_cosine_is_that_of_numpy() -> None:
    one, other = torch.randn(50, 9), torch.randn(50, 9)
    a, b = one.numpy().astype(np.float64), other.numpy().astype(np.float64)
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(cosine(one, other).numpy(), expected, atol=1e-9)
