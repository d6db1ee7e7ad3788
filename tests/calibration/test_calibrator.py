from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.measuring.operations import countable_attention

Host = Callable[..., Any]


@pytest.fixture(scope="session")
def crops(photos: list[Tensor]) -> Tensor:
    """(24, 3, 128, 128) uint8 crops of real photos, some enlarged: busy ones and smooth ones."""
    result = []
    for photo in photos:
        for zoom in (1, 2, 4):
            large = (
                F.interpolate(photo[None].float(), scale_factor=zoom, mode="bilinear").round().clamp(0, 255).byte()[0]
            )
            height, width = large.shape[1:]
            result += [large[:, y : y + 128, x : x + 128] for y, x in ((0, 0), (height // 2, width // 3))]
    return torch.stack(result[:24])


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


@pytest.mark.parametrize(("scales", "least"), [(2, "0.25"), (3, "0.0625")])
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


# Other wishes, limits, held-back images


def mean_gflops(model: Any, images: Tensor) -> float:
    """Counted by running each image through the model with PyTorch's counter, without the head."""
    from functools import partial

    from aptvit.measuring.operations import count_flops

    with torch.inference_mode():
        model(images[:1])  # composes the weights of coarse patches, which is no part of an image's cost
        counted = [count_flops(partial(model.forward_features, image[None])) for image in images]
    return sum(counted) / len(counted) / 1e9


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_a_wish_in_gflops_is_met_as_counted(make_host: Host, crops: Tensor, name: str) -> None:
    host = make_host(name, img_size=112) if "patch14" in name else make_host(name)
    model = aptvit.adapt(host, scales=3)
    side = 128 // (2 * model.patch_size) * 2 * model.patch_size
    images = crops[:, :, :side, :side]
    model.thresholds = (-1.0, -1.0)
    with countable_attention(model, "cpu"):
        uniform = mean_gflops(model, images[:1])
        aptvit.calibrate(model, images, gflops=0.6 * uniform)
        assert mean_gflops(model, images) == pytest.approx(0.6 * uniform, rel=0.01)


@pytest.mark.parametrize("scorer", ["embedding", "glance", "preview"])
def test_operations_of_a_scorer_that_looks_through_the_host_count(make_host: Host, crops: Tensor, scorer: str) -> None:
    scales = 2 if scorer == "preview" else 3
    model = aptvit.adapt(make_host(dynamic_img_size=True), scorer=scorer, scales=scales)
    if scorer == "glance":
        aptvit.fit_glance(model, crops, epochs=1)
    model.thresholds = (-1.0,) * (scales - 1)
    with countable_attention(model, "cpu"):
        uniform = mean_gflops(model, crops[:1])
        aptvit.calibrate(model, crops, gflops=0.8 * uniform)
        assert mean_gflops(model, crops) == pytest.approx(0.8 * uniform, rel=0.01)


def test_a_wish_for_speed_sets_thresholds_from_measured_times(
    model: Any, crops: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose time is proportional to the tokens, twice as fast is half of them."""
    import aptvit.calibration.costs as costs

    lengths = []

    def pretend(runs: Any, rounds: int, device: str) -> list[list[float]]:
        seconds = []
        for run in runs:
            run()
            seconds.append([float(model.layout(crops[:8], keep=run.keywords["keep"]).max_seqlen - 1)] * rounds)
        lengths.append(seconds[1][0])
        return seconds

    monkeypatch.setattr(costs, "interleaved", pretend)
    aptvit.calibrate(model, crops.split(8), speedup=2.0)
    assert abs(mean_share(model, crops) - 0.5) <= 0.01
    assert model.patchifier.calibration["reached"]["speedup"] == pytest.approx(2.0, rel=0.01)
    assert len(set(lengths)) >= 5
    with pytest.raises(ValueError, match=r"speedup=50 cannot be reached .* from 1 to"):
        aptvit.calibrate(model, crops.split(8), speedup=50)


def test_one_wish_at_a_time(model: Any, crops: Tensor) -> None:
    with pytest.raises(ValueError, match=r"give one of keep=0.5 and gflops=3"):
        aptvit.calibrate(model, crops, 0.5, gflops=3)
    with pytest.raises(ValueError, match="gflops=-1 must be more than 0"):
        aptvit.calibrate(model, crops, gflops=-1)
    with pytest.raises(ValueError, match="those of a model"):
        aptvit.calibrate(model.patchifier, crops, gflops=1)


def test_limits_count_in_calibration(make_host: Host, crops: Tensor) -> None:
    model = aptvit.adapt(make_host(depth=1), scales=3, min_keep=0.4, max_tokens=50)
    aptvit.calibrate(model, crops, 0.6)
    assert abs(mean_share(model, crops) - 0.6) <= 0.01
    seqlens = model.layout(crops).seqlens
    assert max(seqlens) <= 50 and min(seqlens) >= 1 + 0.4 * 64
    with pytest.raises(ValueError, match=r"cannot be reached .* from 0\.4"):
        aptvit.calibrate(model, crops, 0.3)


def test_a_blend_is_calibrated_to_the_share(make_host: Host, crops: Tensor) -> None:
    spreads = []
    for blend in (0.0, 0.5, 1.0):
        model = aptvit.adapt(make_host(depth=1), scales=3, blend=blend)
        aptvit.calibrate(model, crops, 0.6)
        assert abs(mean_share(model, crops) - 0.6) <= 1.51 / 64
        lengths = model.layout(crops).seqlens
        spreads.append(max(lengths) - min(lengths))
    assert spreads[0] > spreads[1] > spreads[2] == 0


def test_memory_is_bounded_and_thinning_costs_little(model: Any, crops: Tensor) -> None:
    from aptvit.calibration.calibrator import Calibrator

    exact, thin = (Calibrator(model, {"keep": 0.6}, capacity=capacity) for capacity in (1 << 20, 200))
    for _ in range(20):
        for calibrator in (exact, thin):
            calibrator.add(crops)
        assert sum(len(part) for part in thin._training_steps._parts) <= 400
    expected, got = exact.solve(), thin.solve()
    assert got.num_images == expected.num_images == 480
    assert got.keep_ratio == pytest.approx(0.6, abs=0.01)
    assert abs(mean_share(model, crops) - 0.6) <= 0.03  # a hundredth for each of 200 entries


def test_images_held_back_tell_how_thresholds_carry_over(model: Any, crops: Tensor) -> None:
    from aptvit.calibration.calibrator import Calibrator

    calibrator = Calibrator(model, {"keep": 0.6}, hold_back=4)
    calibrator.add(crops)
    result = calibrator.solve()
    assert abs(mean_share(model, crops) - 0.6) <= 0.01 and result.num_images == 24
    held, others = crops[3::4], torch.stack([crops[i] for i in range(24) if i % 4 != 3])
    aptvit.calibrate(model, others, 0.6)
    assert result.held_back is not None and result.held_back.num_images == 6
    assert result.held_back.keep_ratio == pytest.approx(mean_share(model, held))
    assert result.held_back.error == pytest.approx(mean_share(model, held) / 0.6 - 1)
    shares = [n / 64 for n in (length - 1 for length in model.layout(held).seqlens)]
    assert result.held_back.share_quantiles[0] == pytest.approx(min(shares))
    assert result.held_back.share_quantiles[-1] == pytest.approx(max(shares))


def test_the_calibration_is_stored_with_the_model(make_host: Host, crops: Tensor, tmp_path: Any) -> None:
    model = aptvit.adapt(make_host(), scales=3, min_keep=0.2, blend=0.5)
    aptvit.calibrate(model, crops, 0.6)
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path)
    assert again.budget == model.budget
    assert again.patchifier.calibration["target"] == {"keep": 0.6}
    assert torch.equal(again(crops), model(crops))
    options = aptvit.read_config(tmp_path / "config.json")
    assert aptvit.adapt(make_host(), **options).budget == model.budget
    model.thresholds = (1.0, 1.0)
    assert model.patchifier.calibration is None  # it is no longer what was found
