"""Which patches photos are cut into does not depend on where their entropy is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from aptvit.files.batches import read_images
from aptvit.files.images import find_images
from aptvit.patching.entropy import EntropyScorer
from aptvit.patching.kernels.entropy_torch import entropy_maps
from aptvit.patching.selection import scales_from_thresholds

PHOTOS = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[3] / "data")) / "imagenet_sample"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA = {"input_size": (3, 224, 224), "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9}

Maps = Callable[..., dict[int, Tensor]]


@pytest.fixture(scope="module")
def many_photos() -> Tensor:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS} (APTVIT_DATA)")
    photos = read_images(find_images([PHOTOS]), DATA)
    assert len(photos.pixels) == 500
    return torch.stack(photos.pixels)


def assert_same_layouts(twin: Maps, raw: Tensor, device: str) -> None:
    normalised = (raw.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    grid = (raw.shape[2] // 16, raw.shape[3] // 16)

    def there_and_back(images: Tensor, *arguments: Any) -> dict[int, Tensor]:
        return {factor: scores.cpu() for factor, scores in twin(images.to(device), *arguments).items()}

    for images in (raw, normalised):
        layouts = []
        for way in (
            entropy_maps,
            lambda images, *remaining: {f: m.cpu() for f, m in twin(images.to(device), *remaining).items()},
        ):
            scores = EntropyScorer(kernel=way).score_images(images, MEAN, STD, 16, [2, 4])
            layouts.append(scales_from_thresholds(scores, (6.2, 6.8), grid, len(images)))
        assert len(layouts[0].unique()) == 3
        assert torch.equal(*layouts)


@pytest.mark.slow
def test_numba_gives_the_same_layouts_of_many_photos(many_photos: Tensor) -> None:
    pytest.importorskip("numba")
    from aptvit.patching.kernels import entropy_numba

    assert_same_layouts(entropy_numba.entropy_maps, many_photos, "cpu")


@pytest.mark.slow
def test_triton_gives_the_same_layouts_of_many_photos(
    many_photos: Tensor, entropy_triton: ModuleType, triton_device: str
) -> None:
    for photos in many_photos.split(50):
        assert_same_layouts(entropy_triton.entropy_maps, photos, triton_device)


def test_numba_gives_the_same_layouts(photo_batch: Tensor) -> None:
    pytest.importorskip("numba")
    from aptvit.patching.kernels import entropy_numba

    assert_same_layouts(entropy_numba.entropy_maps, photo_batch, "cpu")


def test_triton_gives_the_same_layouts(photo_batch: Tensor, entropy_triton: ModuleType, triton_device: str) -> None:
    assert_same_layouts(entropy_triton.entropy_maps, photo_batch, triton_device)
