from __future__ import annotations

import torch

from aptvit.storage.agreement import differences, digest_tensors, digest_texts


def test_differences_are_named_with_both_values() -> None:
    before = {"lr": 1e-3, "betas": (0.9, 0.999), "classes": ["cat", "dog"], "gone": 1, "same": {"a": (1,)}}
    now = {"lr": 1e-2, "betas": [0.9, 0.999], "classes": ["dog", "cat"], "new": 2, "same": {"a": [1]}}
    assert differences(before, now) == [
        "lr: 0.001 → 0.01",
        "classes: cat, dog → dog, cat",
        "gone: 1 → none",
        "new: none → 2",
    ]
    assert differences(before, before) == []
    (long,) = differences({"classes": ["x" * 40] * 9}, {"classes": []})
    assert len(long) < 80


def test_digests_depend_on_order_names_types_and_values() -> None:
    assert digest_texts(["a", "b"]) == digest_texts(iter(["a", "b"]))
    assert len({digest_texts(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], [])}) == 4
    assert digest_texts(["\udcff"])  # of a name that is not UTF-8
    ones = torch.ones(2, 2)
    states = [{"w": ones}, {"v": ones}, {"w": ones.half()}, {"w": ones.view(4)}, {"w": 2 * ones}, {}]
    assert len({digest_tensors(state) for state in states}) == len(states)
    assert digest_tensors({"w": ones.bfloat16().T}) == digest_tensors({"w": ones.bfloat16()})
    assert digest_tensors({"n": torch.tensor(1)}) != digest_tensors({"n": torch.tensor(2)})
