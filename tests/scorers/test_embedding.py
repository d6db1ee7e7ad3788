from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aptvit
from aptvit.patching.scoring import get_scorer
from aptvit.scorers.embedding import EmbeddingScorer

Host = Callable[..., Any]


def distances(host: Any, images: Tensor, factor: int) -> np.ndarray:
    """By the definition, patch by patch in numpy: (B, h, w)."""
    embed = host.patch_embed.proj
    weight, p = embed.weight.detach().double().flatten(1).numpy(), embed.kernel_size[0]
    batch, _, height, width = images.shape
    side = factor * p
    result = np.zeros((batch, height // side, width // side))
    for b, y, x in np.ndindex(*result.shape):
        patch = images[b, :, y * side : (y + 1) * side, x * side : (x + 1) * side].double().numpy()
        middle = factor // 2
        # Bilinear reduction by an even factor: the mean of the central two by two pixels of each block.
        blocks = patch.reshape(3, p, factor, p, factor)
        small = blocks[:, :, middle - 1 : middle + 1, :, middle - 1 : middle + 1].mean((2, 4))
        coarse = weight @ small.reshape(-1)
        parts = [
            weight @ patch[:, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(-1)
            for i in range(factor)
            for j in range(factor)
        ]
        result[b, y, x] = ((coarse - np.mean(parts, axis=0)) ** 2).sum()
    return result


def test_it_is_the_distance_from_the_mean_of_the_base_patches(make_host: Host, images: Tensor) -> None:
    host = make_host()
    scorer = EmbeddingScorer(aptvit.adapt(host).packed_encoder.derived.maps_for_scoring, dims=None)
    maps = scorer.score_images(images, (0.5,) * 3, (0.5,) * 3, 16, (2, 4))
    for factor in (2, 4):
        np.testing.assert_allclose(maps[factor].numpy(), distances(host, images, factor), rtol=1e-4)


def test_projected_it_orders_patches_nearly_the_same(make_host: Host, images: Tensor) -> None:
    derived = aptvit.adapt(make_host()).packed_encoder.derived
    exact, projected = (
        EmbeddingScorer(derived.maps_for_scoring, dims=dims).score_images(images, (0.5,), (0.5,), 16, (2,))[2].flatten()
        for dims in (None, 64)
    )
    assert float(projected.mean() / exact.mean()) == pytest.approx(1, abs=0.2)
    ranks = torch.stack([exact, projected]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_raw_pixels_score_as_normalised_ones(make_host: Host, photo_batch: Tensor, images: Tensor) -> None:
    model = aptvit.adapt(make_host(), scorer="embedding", scales=3, keep=0.5)
    ((_, raw),) = model.scores(photo_batch)
    ((_, normalised),) = model.scores(images)
    for factor in (2, 4):
        torch.testing.assert_close(raw[factor], normalised[factor], rtol=1e-3, atol=1e-4)
    assert torch.equal(model.layout(photo_batch).scale_map, model.layout(images).scale_map)


def test_it_follows_the_weights_of_its_own_model(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(), scorer="embedding")
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ((_, before),) = model.scores(images)
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(2)
    ((_, after),) = model.scores(images)
    torch.testing.assert_close(after[2], 4 * before[2])
    for other in (twin, loaded):
        ((_, kept),) = other.scores(images)
        torch.testing.assert_close(kept[2], before[2])


@torch.no_grad()
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_scores_by_its_own_weights(make_host: Host, images: Tensor, again: Callable[[Any], Any]) -> None:
    model = aptvit.adapt(make_host(), scorer="embedding", keep=0.6)
    expected = model(images)
    other = again(model)
    assert torch.equal(other(images), expected)
    other.patch_embed.proj.weight.data.mul_(torch.linspace(-1, 1, 16))
    assert not torch.equal(other.layout(images).scale_map, model.layout(images).scale_map)
    assert torch.equal(model(images), expected)


def test_the_scorer_is_saved_by_name(make_host: Host, images: Tensor, tmp_path: Any) -> None:
    model = aptvit.adapt(make_host(), scorer="embedding", keep=0.6)
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path)
    assert torch.equal(again(images), model(images))


def test_images_too_small_for_a_coarse_patch_have_no_scores(make_host: Host) -> None:
    model = aptvit.adapt(make_host(), scorer="embedding", thresholds=(1e9, 1e9))
    layout = model.layout(torch.rand(2, 3, 48, 16))
    assert layout.seqlens == [4, 4]
    assert model.layout(torch.rand(2, 3, 48, 32)).seqlens == [1 + 3, 1 + 3]  # one 2x patch and two base ones


def test_without_a_model_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"come with aptvit\.adapt"):
        get_scorer("embedding")
