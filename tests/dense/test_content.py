from __future__ import annotations

import pytest
import torch

from aptvit.dense import content_keep_ratio
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier


def test_padding_is_not_counted() -> None:
    pictures = torch.zeros(2, 3, 64, 96)
    pictures[0, :, :64, :48] = torch.rand(3, 64, 48) * 255  # the rest is padding
    pictures[1, :, :32, :96] = torch.rand(3, 32, 96) * 255
    patchifier = Patchifier(16, thresholds=(3.0, 3.0), std=(1 / 255,))
    layout = patchifier(patchifier.groups(pictures))
    assert layout.keep_ratio < 0.75
    assert content_keep_ratio(layout, [(64, 48), (32, 96)]) == 1.0
    assert content_keep_ratio(layout, [(64, 96), (64, 96)]) == pytest.approx(layout.keep_ratio)


def test_a_patch_counts_if_any_of_it_is_picture() -> None:
    layout = PatchLayout.from_scale_map(torch.ones(1, 4, 4, dtype=torch.int8), 16, 2)
    assert content_keep_ratio(layout, [(33, 16)]) == pytest.approx(2 / 3)  # rows 0 to 2 of column 0, in two patches


def test_bad_sizes_are_named() -> None:
    layout = PatchLayout.from_scale_map(torch.zeros(1, 4, 4, dtype=torch.int8), 16, 2)
    with pytest.raises(ValueError, match="2 sizes for 1 images"):
        content_keep_ratio(layout, [(64, 64), (64, 64)])
    with pytest.raises(ValueError, match="larger than its grid of 4x4"):
        content_keep_ratio(layout, [(64, 65)])
