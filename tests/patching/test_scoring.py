from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aptvit.patching import entropy
from aptvit.patching.entropy import EntropyScorer
from aptvit.patching.kernels import entropy_torch
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import ExactScorer, LaplacianScorer, UpsampleScorer, get_scorer


@pytest.fixture(autouse=True, scope="module")
def _without_kernels() -> Iterator[None]:
    """The oracle is tested here, its twins in tests/kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "has_numba", lambda: False)
        yield


SCORERS = ["entropy", "laplacian", "upsample", "exact"]


def gray_of(pixels: Tensor) -> Tensor:
    r, g, b = pixels.unbind(1)
    return 0.2989 * r + 0.5870 * g + 0.1140 * b


def entropy_by_histc(gray: Tensor, patch: int) -> Tensor:
    """Every patch by itself, as the paper's code does. (B, H, W) -> (B, H // patch, W // patch)"""
    rows, cols = gray.shape[1] // patch, gray.shape[2] // patch
    out = torch.zeros(len(gray), rows, cols)
    for b in range(len(gray)):
        for y in range(rows):
            for x in range(cols):
                values = gray[b, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                p = torch.histc(values, bins=512, min=0, max=255) / patch**2
                out[b, y, x] = -(p * torch.log2(p + 1e-10)).sum()
    return out


def entropy_by_numpy(gray: np.ndarray, patch: int) -> np.ndarray:
    rows, cols = gray.shape[0] // patch, gray.shape[1] // patch
    out = np.zeros((rows, cols))
    for y in range(rows):
        for x in range(cols):
            values = gray[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            counts, _ = np.histogram(values, bins=512, range=(0, 255))
            p = counts[counts > 0] / counts.sum()
            out[y, x] = -(p * np.log2(p)).sum()
    return out


def ramp(height: int, width: int) -> Tensor:
    return torch.linspace(0, 255, width).expand(1, 3, height, width).contiguous()


def checkered() -> Tensor:
    """Black and white pixels in turns."""
    return 255.0 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2).expand(1, 3, 64, 64)


PICTURES = {
    "noise": lambda: torch.rand(2, 3, 64, 96) * 255,
    "whole numbers": lambda: torch.randint(0, 256, (2, 3, 64, 96)).float(),
    "black": lambda: torch.zeros(1, 3, 64, 64),
    "white": lambda: torch.full((1, 3, 64, 64), 255.0),
    "ramp": lambda: ramp(64, 96),
    "vertical ramp": lambda: ramp(64, 64).transpose(2, 3).contiguous(),
    "checkered": checkered,
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("patch", [14, 16])
def test_entropy_is_that_of_histc_on_each_patch(name: str, patch: int) -> None:
    pixels = PICTURES[name]()
    scores = EntropyScorer()(pixels, patch, [2])[2]
    torch.testing.assert_close(scores, entropy_by_histc(gray_of(pixels), 2 * patch), atol=0.02, rtol=0)
    expected = np.stack([entropy_by_numpy(one.numpy(), 2 * patch) for one in gray_of(pixels)])
    np.testing.assert_allclose(scores.numpy(), expected, atol=0.02)


def test_entropy_of_real_photos_is_that_of_histc(photos: list[Tensor]) -> None:
    for photo in photos:
        pixels = photo[None, :, 60:220, 40:260].float()
        for factor, scores in EntropyScorer()(pixels, 16, [2, 4]).items():
            torch.testing.assert_close(scores, entropy_by_histc(gray_of(pixels), 16 * factor), atol=0.02, rtol=0)


def test_entropy_has_known_values() -> None:
    assert EntropyScorer()(PICTURES["black"](), 16, [2])[2].tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    assert EntropyScorer()(PICTURES["white"](), 16, [2])[2].tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    torch.testing.assert_close(EntropyScorer()(checkered(), 16, [2])[2], torch.ones(1, 2, 2))  # two equal halves
    four = (torch.arange(64) % 4 * 80.0).expand(1, 3, 64, 64)
    torch.testing.assert_close(EntropyScorer()(four, 16, [2, 4])[4], torch.full((1, 1, 1), 2.0))


def test_entropy_of_values_a_rounding_outside_the_range_counts_them_at_the_ends() -> None:
    pixels = torch.where(checkered() > 0, 255.3, -0.3)
    torch.testing.assert_close(EntropyScorer()(pixels, 16, [2])[2], torch.ones(1, 2, 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_scales_scored_together_or_alone_are_the_same(height: int, width: int, patch: int, seed: int) -> None:
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 255
    joint = EntropyScorer()(pixels, patch, [2, 4, 8])
    for factor in (2, 4, 8):
        separate = EntropyScorer()(pixels, patch, [factor])
        assert list(separate) == [factor]
        assert torch.equal(separate[factor], joint[factor])
    assert torch.equal(EntropyScorer()(pixels, patch, [2, 8])[8], joint[8])


def test_raw_pixels_are_counted_as_integers_would_be() -> None:
    values = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
    every = torch.cartesian_prod(*[torch.arange(256)] * 3)
    edges = every[(every * torch.tensor([2989, 5870, 1140])).sum(1) % 159375 == 0]  # whole multiples of a bin's width
    assert len(edges) > 50
    values.view(1, 3, -1)[0, :, : len(edges)] = edges.T.to(torch.uint8)
    total = (values[0].long() * torch.tensor([2989, 5870, 1140]).view(3, 1, 1)).sum(0)
    expected = (total * 32 // 159375).clamp(max=511)
    got = entropy_torch._levels(values, (2989.0, 5870.0, 1140.0), 0.0, 512 / 2550000, 512)[0]
    # The sum is exact; one product is rounded, which may lift what lies within 2e-5 of a bin below the next.
    lifted = (total * 32 % 159375 >= 159375 - 2) & (got == expected + 1)
    assert torch.equal(got[~lifted].long(), expected[~lifted])


def test_histograms_add_up_exactly() -> None:
    """The histogram of a patch is the sum of those of its four quarters."""
    level = torch.randint(0, 512, (2, 96, 64))
    fine = entropy_torch._histogram_numpy(level, 16, 512)
    coarse = entropy_torch._histogram_numpy(level, 32, 512)
    quarters = fine[:, 0::2, 0::2] + fine[:, 1::2, 0::2] + fine[:, 0::2, 1::2] + fine[:, 1::2, 1::2]
    assert torch.equal(coarse, quarters)
    assert (coarse.sum(-1) == 32 * 32).all()


@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (1, 3, 60, 44), (3, 1, 32, 32), (1, 3, 20, 20)])
def test_both_ways_to_count_agree(shape: tuple[int, ...]) -> None:
    level = torch.randint(0, 512, (shape[0], *shape[2:]))
    assert torch.equal(
        entropy_torch._histogram_numpy(level, 16, 512), entropy_torch._histogram_scatter(level, 16, 512).long()
    )


def test_the_way_of_other_devices_gives_the_same_entropy(monkeypatch: pytest.MonkeyPatch, photo_batch: Tensor) -> None:
    expected = EntropyScorer()(photo_batch.float(), 16, [2, 4])
    monkeypatch.setattr(entropy_torch, "_histogram_numpy", entropy_torch._histogram_scatter)
    for factor, scores in EntropyScorer()(photo_batch.float(), 16, [2, 4]).items():
        assert torch.equal(scores, expected[factor])


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.5,) * 3, (0.5,) * 3),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.48, 0.45, 0.40), (0.26, 0.26, 0.27)),
    ],
)
def test_normalised_images_score_as_raw_ones(
    photo_batch: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    patchifier = Patchifier(16, thresholds=(1.0, 1.0), mean=mean, std=std)
    normalised = (photo_batch.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = EntropyScorer()(photo_batch.float(), 16, [2, 4])
    for images in (photo_batch, normalised, normalised.double()):
        ((_, scores),) = patchifier.scores(images)
        for factor in (2, 4):
            torch.testing.assert_close(scores[factor], expected[factor], atol=0.02, rtol=0)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("size", [(16, 16), (16, 80), (48, 80), (80, 112), (144, 32)])
def test_incomplete_patches_have_no_score(name: str, size: tuple[int, int]) -> None:
    pixels = torch.rand(2, 3, *size) * 255
    scores = get_scorer(name)(pixels, 16, [2, 4])
    for factor in (2, 4):
        assert scores[factor].shape == (2, size[0] // (16 * factor), size[1] // (16 * factor))
    patchifier = Patchifier(16, thresholds=(1e9, 1e9), scorer=name)
    layout = patchifier(patchifier.groups(pixels / 255))  # everything that can be coarse is
    for y, x, side in layout.patches(0).tolist():
        assert y % side == 0 and x % side == 0
        assert y + side <= size[0] and x + side <= size[1]


@pytest.mark.parametrize("name", SCORERS)
def test_pixels_outside_a_complete_patch_do_not_change_the_scores_of_entropy_and_upsample(name: str) -> None:
    """What hangs over at the right and bottom is cut, not filled; only the Laplacian sees one pixel beyond."""
    pixels = torch.rand(1, 3, 80, 112) * 255
    whole = get_scorer(name)(pixels, 16, [2])[2]
    cut = get_scorer(name)(pixels[:, :, :64, :96], 16, [2])[2]
    tolerance = {"entropy": 0.0, "upsample": 1e-7, "laplacian": 0.05, "exact": 0.0}[name]
    torch.testing.assert_close(whole, cut, atol=tolerance, rtol=0)


@pytest.mark.parametrize("factors", [[2], [2, 4, 8], [4, 8]])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_exact_is_the_range_of_each_patch(factors: list[int], channels: int) -> None:
    pixels = torch.randint(0, 256, (2, channels, 80, 112)).float()
    for factor, scores in ExactScorer()(pixels, 4, factors).items():
        side = 4 * factor
        for row, col in np.ndindex(80 // side, 112 // side):
            patch = pixels[:, :, row * side : (row + 1) * side, col * side : (col + 1) * side].numpy()
            expected = np.ptp(patch, axis=(2, 3)).max(1)
            assert scores[:, row, col].tolist() == expected.tolist()


def test_below_a_level_only_patches_of_one_colour_are_merged() -> None:
    """As for a page with text: what is merged is one colour, and what is one colour is merged, to the largest size."""
    page = torch.full((1, 3, 384, 192), 255, dtype=torch.uint8)
    page[:, :, 40:44, 30:150:7] = 0
    page[:, 1, 200, 100] = 254  # one level of one channel of one pixel
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    patchifier = Patchifier(16, scorer="exact", thresholds=(1.0, 1.0, 1.0), mean=mean, std=std)
    normalised = (page.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for images in (page, normalised):
        layout = patchifier(patchifier.groups(images))
        patches = layout.patches(0).tolist()
        for y, x, side in patches:
            patch = page[0, :, y : y + side, x : x + side].flatten(1)
            assert side == 16 or torch.equal(patch.amin(1), patch.amax(1))
        assert {side for *_, side in patches} == {16, 32, 64, 128} and layout.keep_ratio < 0.5
        for y, x in np.ndindex(3, 1):  # whole patches of 128: only those with a mark in them are divided
            has_mark = page[0, :, 128 * y : 128 * y + 128, 128 * x : 128 * x + 128].amin() < 255
            assert ([128 * y, 128 * x, 128] in patches) != bool(has_mark)


def laplacian_by_numpy(gray: np.ndarray, side: int) -> np.ndarray:
    """gray in [0, 1]; mean |8 x - neighbours| with mirrored borders."""
    height, width = gray.shape
    response = np.zeros_like(gray)
    for y in range(height):
        for x in range(width):
            total = 8 * gray[y, x]
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if (dy, dx) != (0, 0):
                        yy, xx = abs(y + dy), abs(x + dx)
                        yy = yy if yy < height else 2 * height - 2 - yy
                        xx = xx if xx < width else 2 * width - 2 - xx
                        total -= gray[yy, xx]
            response[y, x] = abs(total)
    rows, cols = height // side, width // side
    return response[: rows * side, : cols * side].reshape(rows, side, cols, side).mean((1, 3))


def test_laplacian_is_the_mean_response_with_mirrored_borders(photo_batch: Tensor) -> None:
    for pixels in (torch.rand(1, 3, 40, 56) * 255, photo_batch[:1, :, 30:70, 20:76].float()):
        scores = LaplacianScorer()(pixels, 4, [2, 4])
        gray = gray_of(pixels / 255)[0].double().numpy()
        for factor in (2, 4):
            expected = laplacian_by_numpy(gray, 4 * factor)
            np.testing.assert_allclose(scores[factor][0].numpy(), expected, atol=2e-4)


def test_laplacian_of_flat_images_and_even_ramps_is_zero() -> None:
    assert LaplacianScorer()(torch.full((1, 3, 64, 64), 77.0), 16, [2])[2].abs().max() < 1e-4
    assert LaplacianScorer()(ramp(64, 128), 16, [2])[2][0, :, 1:3].abs().max() < 1e-4  # its ends bend at the mirror


def test_upsample_is_the_error_of_reducing_and_enlarging(photo_batch: Tensor) -> None:
    pixels = photo_batch[:2, :, :96].float()
    scores = UpsampleScorer()(pixels, 16, [2, 4])
    for factor in (2, 4):
        image = pixels[:, :, : 96 // (16 * factor) * 16 * factor] / 255
        small = F.interpolate(image, scale_factor=1 / factor, mode="bilinear", align_corners=False, antialias=False)
        back = F.interpolate(small, size=image.shape[-2:], mode="bilinear", align_corners=False)
        error = ((back - image) ** 2).mean(1)
        side = 16 * factor
        for y in range(error.shape[1] // side):
            for x in range(error.shape[2] // side):
                expected = error[:, y * side : (y + 1) * side, x * side : (x + 1) * side].mean((1, 2))
                torch.testing.assert_close(scores[factor][:, y, x], expected)


@pytest.mark.parametrize("name", SCORERS)
def test_busy_patches_score_higher_than_smooth_ones(name: str) -> None:
    pixels = ramp(64, 64) / 16 + 100
    pixels[:, :, :32, :32] = torch.rand(1, 3, 32, 32) * 255
    scores = get_scorer(name)(pixels, 16, [2])[2][0]
    assert scores[0, 0] > 2 * scores[0, 1] and scores[0, 0] > 2 * scores[1, 1]


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_does_not_depend_on_the_other_images_of_the_batch(name: str) -> None:
    pixels = torch.rand(3, 3, 64, 64) * torch.tensor([1.0, 30.0, 255.0]).view(3, 1, 1, 1)
    joint = get_scorer(name)(pixels, 16, [2, 4])
    for i in range(3):
        separate = get_scorer(name)(pixels[i : i + 1], 16, [2, 4])
        for factor in (2, 4):
            torch.testing.assert_close(separate[factor][0], joint[factor][i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["entropy", "laplacian"])
@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_other_than_three_channels_score_the_mean_of_their_scores(name: str, channels: int) -> None:
    pixels = torch.randint(0, 256, (2, channels, 64, 64)).float()
    pixels[:, -1] //= 64
    each = [get_scorer(name)(pixels[:, c : c + 1].expand(-1, 3, -1, -1) / 0.9999, 16, [2, 4]) for c in range(channels)]
    for factor, scores in get_scorer(name)(pixels, 16, [2, 4]).items():  # weights of gray sum to 0.9999
        expected = torch.stack([maps[factor] for maps in each]).mean(0)
        torch.testing.assert_close(scores, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_normalised_channels_score_as_raw_channels(channels: int) -> None:
    pixels = torch.randint(0, 256, (2, channels, 64, 64))
    mean, std = torch.rand(2, channels).clamp(0.1, 0.9)
    normalised = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    scores = EntropyScorer().score_images(normalised, mean.tolist(), std.tolist(), 16, [2])[2]
    torch.testing.assert_close(scores, EntropyScorer()(pixels.float(), 16, [2])[2], atol=0.05, rtol=0)


@pytest.mark.parametrize("channels", [1, 4])
def test_upsample_averages_over_all_channels(channels: int) -> None:
    pixels = torch.rand(2, channels, 64, 64) * 255
    each = torch.stack([UpsampleScorer()(pixels[:, c : c + 1], 16, [2])[2] for c in range(channels)])
    torch.testing.assert_close(UpsampleScorer()(pixels, 16, [2])[2], each.mean(0))


def test_a_callable_is_a_scorer() -> None:
    received: list[Any] = []

    def brightness(pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        received.append((pixels.dtype, tuple(pixels.shape), patch_size, list(factors)))
        return {f: F.avg_pool2d(pixels[:, :1], f * patch_size)[:, 0] for f in factors}

    assert get_scorer(brightness) is brightness
    patchifier = Patchifier(16, thresholds=(100.0, 1.0), scorer=brightness)
    raw = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    raw[:, :, :32] = 200
    layout = patchifier(patchifier.groups(raw))
    assert received == [(torch.float32, (1, 3, 64, 64), 16, [2, 4])]
    assert layout.scale_map[0].tolist() == [[0] * 4] * 2 + [[1] * 4] * 2


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown scorer 'entrpy'.*entropy, laplacian, upsample"):
        get_scorer("entrpy")


def test_no_factors_no_scores() -> None:
    for name in SCORERS:
        assert get_scorer(name)(torch.rand(1, 3, 64, 64), 16, []) == {}


class LargestTensor(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor):
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("way", ["_histogram_numpy", "_histogram_scatter"])
def test_memory_does_not_grow_with_bins_times_pixels(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The released code's one-hot tensor takes 2048 bytes a pixel."""
    monkeypatch.setattr(entropy_torch, "_histogram_numpy", getattr(entropy_torch, way))
    pixels = torch.rand(2, 3, 512, 512) * 255
    count, table = pixels[:, 0].numel(), 2 * 16 * 16 * 512 * 8  # one histogram of int64 for each finest cell
    tracemalloc.start()
    with LargestTensor() as largest:
        EntropyScorer()(pixels, 16, [2, 4])
    _, peak = tracemalloc.get_traced_memory()  # of numpy
    tracemalloc.stop()
    assert peak < 8 * count + table
    assert largest.nbytes <= max(pixels.nbytes, 8 * count + table)
