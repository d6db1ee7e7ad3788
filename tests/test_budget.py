from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit

Host = Callable[..., Any]


@pytest.fixture(scope="session")
def crops(photos: list[Tensor]) -> Tensor:
    """(24, 3, 128, 128) uint8 crops of real photos, some enlarged: busy ones and smooth ones."""
    found = []
    for photo in photos:
        for zoom in (1, 2, 4):
            large = (
                F.interpolate(photo[None].float(), scale_factor=zoom, mode="bilinear").round().clamp(0, 255).byte()[0]
            )
            height, width = large.shape[1:]
            found += [large[:, y : y + 128, x : x + 128] for y, x in ((0, 0), (height // 2, width // 3))]
    return torch.stack(found[:24])


@pytest.fixture
def model(make_host: Host) -> Any:
    return aptvit.adapt(make_host(depth=1), scales=3)


def mean_share(model: Any, images: Any) -> float:
    """Mean over images of patches kept / patches of the uniform grid."""
    layout = model.layout(images)
    shares = [len(layout.patches(i)) / (rows * cols) for i, (rows, cols) in enumerate(layout.grid_sizes)]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("scales", [2, 3])
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.75, 1.0])
def test_calibrated_thresholds_keep_the_wished_share(make_host: Host, crops: Tensor, scales: int, keep: float) -> None:
    model = aptvit.adapt(make_host(depth=1), keep=0.9, scales=scales)
    thresholds = aptvit.calibrate(model, crops, keep)
    assert model.thresholds == thresholds and model.keep is None
    assert len(thresholds) == scales - 1 and len(set(thresholds)) == 1
    assert abs(mean_share(model, crops) - keep) <= 0.01


def test_half_is_the_default(model: Any, crops: Tensor) -> None:
    aptvit.calibrate(model, crops)
    assert abs(mean_share(model, crops) - 0.5) <= 0.01


def test_busy_images_keep_more(model: Any, crops: Tensor) -> None:
    aptvit.calibrate(model, crops, 0.6)
    layout = model.layout(crops)
    zoomed = [i for i in range(24) if i % 6 >= 4]  # by four, so smooth
    sharp = [i for i in range(24) if i % 6 < 2]
    assert sum(layout.seqlens[i] for i in zoomed) / len(zoomed) < 0.8 * sum(layout.seqlens[i] for i in sharp) / len(
        sharp
    )


def test_all_ways_to_give_images_agree(model: Any, crops: Tensor) -> None:
    expected = aptvit.calibrate(model, crops, 0.6)

    def batches() -> Iterator[Tensor]:
        yield from crops.split(7)

    normalised = (crops.float() / 255 - 0.5) / 0.5
    for images in (list(crops), tuple(crops), list(crops.split(5)), batches(), [list(crops[:3]), crops[3:]]):
        assert aptvit.calibrate(model, images, 0.6) == expected
    close = aptvit.calibrate(aptvit.adapt(model.adapter.vit, scales=3, mean=(0.5,), std=(0.5,)), normalised, 0.6)
    assert close == pytest.approx(expected, abs=0.02)


def test_images_of_many_sizes(model: Any, crops: Tensor) -> None:
    images = [crop[:, : 16 * (3 + i % 6), : 16 * (8 - i % 5)] for i, crop in enumerate(crops)]
    aptvit.calibrate(model, images, 0.7)
    assert abs(mean_share(model, images) - 0.7) <= 0.01
    for kept in (0.7, 0.55):
        aptvit.calibrate(model, ([image] for image in images), kept)
        assert abs(mean_share(model, images) - kept) <= 0.01


def test_an_earlier_budget_does_not_matter(model: Any, crops: Tensor) -> None:
    expected = aptvit.calibrate(model, crops, 0.6)
    model.thresholds = (9.0, 1.0)
    assert aptvit.calibrate(model, crops, 0.6) == expected
    model.keep = 0.4
    assert aptvit.calibrate(model, crops, 0.6) == expected


@pytest.mark.parametrize("scorer", ["laplacian", "upsample"])
def test_other_scorers_can_be_calibrated(make_host: Host, crops: Tensor, scorer: str) -> None:
    model = aptvit.adapt(make_host(depth=1), scales=3, scorer=scorer)
    aptvit.calibrate(model, crops, 0.5)
    assert abs(mean_share(model, crops) - 0.5) <= 0.01


def test_the_nearest_share_is_taken_where_images_are_few(model: Any) -> None:
    """Two flat images and two of noise: only 1, 0.53 and 0.06 of the tokens can be kept with equal scores."""
    flat = torch.full((2, 3, 64, 64), 7, dtype=torch.uint8)
    noise = (torch.rand(2, 3, 64, 64) * 255).byte()
    aptvit.calibrate(model, torch.cat([flat, noise]), 0.55)
    assert mean_share(model, flat) == pytest.approx(1 / 16)
    assert mean_share(model, noise) == 1


@pytest.mark.parametrize(("scales", "least"), [(2, "0.250"), (3, "0.062")])
def test_a_share_out_of_reach_names_the_range(make_host: Host, crops: Tensor, scales: int, least: str) -> None:
    model = aptvit.adapt(make_host(depth=1), scales=scales, thresholds=(1.0,) * (scales - 1))
    with pytest.raises(ValueError, match=rf"keep=0\.05 cannot be reached .* {scales} scales: from {least} to 1"):
        aptvit.calibrate(model, crops, 0.05)
    assert model.thresholds == (1.0,) * (scales - 1)


@pytest.mark.parametrize("images", [[], iter([]), ()])
def test_no_images_are_refused(model: Any, images: Any) -> None:
    with pytest.raises(ValueError, match="there are no images to calibrate on"):
        aptvit.calibrate(model, images)


def test_other_mistakes_are_refused(model: Any, crops: Tensor) -> None:
    for keep in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="must be a share"):
            aptvit.calibrate(model, crops, keep)
    with pytest.raises(ValueError, match="too small to hold a coarse patch"):
        aptvit.calibrate(model, crops[:, :, :16, :16], 0.5)
    model.thresholds = ()
    with pytest.raises(ValueError, match="one scale merges nothing"):
        aptvit.calibrate(model, crops)


def test_images_too_small_for_a_coarse_patch_count_as_whole(model: Any, crops: Tensor) -> None:
    images = [*crops[:8, :, :128], *crops[8:12, :, :16, :32]]
    aptvit.calibrate(model, images, 0.7)
    assert abs(mean_share(model, images) - 0.7) <= 0.01
