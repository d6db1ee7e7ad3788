from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from merging.test_random import of_host
from torch import Tensor

from aptvit.merging import pixelprune
from aptvit.merging.pixelprune import predict_patches, sources_of

Host = Callable[..., Any]


def by_loops(image: np.ndarray, side: int, tolerance: float) -> tuple[list[int], list[int]]:
    """The rule, patch by patch: numbers of the kept patches, and for each patch the kept one that stands for it."""
    rows, columns = image.shape[1] // side, image.shape[2] // side

    def patch(i: int, j: int) -> np.ndarray:
        return image[:, i * side : (i + 1) * side, j * side : (j + 1) * side].astype(float)

    def alike(one: np.ndarray, other: np.ndarray) -> bool:
        return bool(abs(one - other).max() <= tolerance)

    kept, sources = [], []
    for i in range(rows):
        for j in range(columns):
            number, predictor = i * columns + j, None
            if i == 0 and j > 0:
                predictor = (i, j - 1)
            elif j == 0 and i > 0:
                predictor = (i - 1, j)
            elif i > 0:
                left, above, corner = patch(i, j - 1), patch(i - 1, j), patch(i - 1, j - 1)
                predictor = (i - 1, j) if alike(corner, left) and not alike(corner, above) else (i, j - 1)
            if predictor is not None and alike(patch(i, j), patch(*predictor)):
                sources.append(sources[predictor[0] * columns + predictor[1]])
            else:
                kept.append(number)
                sources.append(number)
    return kept, sources


def pages(count: int = 5) -> Tensor:
    """(B, 3, 128, 128) levels: white, bands, a box, lines of text, faint noise."""
    random = np.random.default_rng(0)
    images = np.full((count, 3, 128, 128), 255, dtype=np.float32)
    images[1, :, 32:64] = 90
    images[1, :, :, 80:] = 200
    images[2, :, 16:80, 48:96] = random.integers(0, 3, (3, 1, 1)) * 60
    images[3, :, 20:100, 10:90] = random.integers(0, 2, (80, 80)) * 255
    images[4] -= random.integers(0, 4, (3, 128, 128))
    return torch.from_numpy(images)


@pytest.mark.parametrize("tolerance", [0.0, 3.0])
def test_the_rule_is_that_of_loops(tolerance: float) -> None:
    images = pages()
    difference, from_above = predict_patches(images, 16, tolerance)
    kept = difference > tolerance + 0.01
    sources = sources_of(kept, from_above)
    for number, image in enumerate(images):
        expected, expected_sources = by_loops(image.numpy(), 16, tolerance)
        assert kept[number].flatten().nonzero()[:, 0].tolist() == expected
        assert sources[number].tolist() == expected_sources


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_little_patch16_reg4_gap_256"])
def test_the_host_runs_on_what_is_kept(make_host: Host, name: str) -> None:
    host = make_host(name)
    host.pretrained_cfg = {"std": (0.2, 0.5, 0.3)}
    std = torch.tensor((0.2, 0.5, 0.3))[:, None, None]
    images = (pages() / 255 - 0.4) / std
    model = pixelprune(host)
    kept = model.kept_patches(images)
    subsets = [by_loops(image.numpy(), 16, 0.0)[0] for image in pages()]
    assert [mask.flatten().nonzero()[:, 0].tolist() for mask in kept] == subsets
    assert len({len(subset) for subset in subsets}) > 3
    with torch.no_grad():
        expected = torch.cat(
            [of_host(host, image[None], [subset]) for image, subset in zip(images, subsets, strict=True)]
        )
        assert torch.allclose(model(images), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"these images keep 1 to \d+ patches.*keep="):
        model.forward_features(images)


def test_with_a_share_the_most_different_patches_are_kept(make_host: Host, images: Tensor) -> None:
    host = make_host("vit_tiny_patch16_224")
    model = pixelprune(host, keep=0.3)
    kept = model.kept_patches(images)
    assert kept.flatten(1).sum(1).tolist() == [19] * len(images)
    difference = predict_patches(images, 16)[0]
    for mask, values in zip(kept, difference, strict=True):
        assert values[mask].min() >= values[~mask].max()
    assert model.tokens_per_block() == [20] * 2
    assert model.forward_features(images).tokens.shape[1] == 20
    with torch.no_grad():
        assert torch.allclose(pixelprune(host, keep=1.0)(images), host(images), atol=1e-5)


def test_refusals(make_host: Host) -> None:
    host = make_host("vit_tiny_patch16_224")
    for options, message in (
        ({"tolerance": -1.0}, "tolerance=-1.0 must be"),
        ({"keep": 0.0}, "keep=0.0 must be"),
        ({"tolerance": 1.0, "keep": 0.5}, "not both"),
        ({"r": 3}, "has no r=3: its own setting is tolerance="),
    ):
        with pytest.raises(ValueError, match=message):
            pixelprune(host, **options)
    with pytest.raises(ValueError, match="depends on the image"):
        pixelprune(host).tokens_per_block()
