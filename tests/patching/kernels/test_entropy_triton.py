from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

GRAY = ((2989.0, 5870.0, 1140.0), 0.5, 512 / 2550000)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_entropy_is_that_of_the_formula(
    entropy_triton: ModuleType, triton_device: str, check_entropy: Callable[..., None], data: st.DataObject
) -> None:
    check_entropy(entropy_triton.entropy_maps, data, triton_device)


def test_photos_fall_on_the_same_side_of_a_threshold(
    entropy_triton: ModuleType,
    triton_device: str,
    entropy_by_numpy: Callable[..., np.ndarray],
    photo_batch: Tensor,
) -> None:
    maps = entropy_triton.entropy_maps(photo_batch[:3].to(triton_device), *GRAY, 16, [2, 4], 512)
    for factor, scores in maps.items():
        expected = entropy_by_numpy(photo_batch[:3], *GRAY, 16 * factor, 512)
        np.testing.assert_allclose(scores.cpu().numpy(), expected, atol=1e-5)
        for threshold in (5.0, 5.5, 6.0, 6.5):
            np.testing.assert_array_equal(scores.cpu().numpy() < threshold, expected < threshold)


def test_a_patch_of_several_chunks_has_known_entropy(entropy_triton: ModuleType, triton_device: str) -> None:
    images = torch.zeros(1, 1, 200, 100, dtype=torch.uint8, device=triton_device)
    images[:, :, 50:] = 100
    maps = entropy_triton.entropy_maps(images, (1.0,), 0.0, 1.0, 25, [2, 4], 512)
    assert maps[2].tolist() == [[[0.0, 0.0]] * 4]  # exactly: nothing is left of rounding
    torch.testing.assert_close(maps[4].cpu(), torch.tensor([[[1.0], [0.0]]]))


def test_values_outside_the_range_count_at_its_ends(entropy_triton: ModuleType, triton_device: str) -> None:
    pixels = torch.tensor([-torch.inf, -1e30, torch.nan, -0.3, 255.3, 1e30, torch.inf, 255.0], device=triton_device)
    maps = entropy_triton.entropy_maps(pixels.expand(1, 1, 8, 8), (1.0,), 0.0, 512 / 255, 4, [2], 512)
    torch.testing.assert_close(maps[2].cpu(), torch.ones(1, 1, 1))  # two equal halves


@pytest.mark.parametrize(("batch", "height", "width"), [(0, 32, 32), (2, 31, 64), (2, 64, 31)])
def test_there_may_be_no_patch(
    entropy_triton: ModuleType, triton_device: str, batch: int, height: int, width: int
) -> None:
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8, device=triton_device)
    maps = entropy_triton.entropy_maps(images, *GRAY, 16, [2, 4], 512)
    assert {factor: scores.shape for factor, scores in maps.items()} == {
        factor: (batch, height // (16 * factor), width // (16 * factor)) for factor in (2, 4)
    }
    assert entropy_triton.entropy_maps(images, *GRAY, 16, [], 512) == {}


def test_it_does_not_wait_for_the_device(entropy_triton: ModuleType, triton_device: str) -> None:
    if triton_device == "cpu":
        pytest.skip("needs a GPU")
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=triton_device)
    entropy_triton.entropy_maps(images, *GRAY, 16, [2], 512)
    torch.cuda.set_sync_debug_mode("error")
    try:
        entropy_triton.entropy_maps(images, *GRAY, 16, [2], 512)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_compiles(compile_for_gpu: Callable[..., None]) -> None:
    integers = ("out_stride", "height", "width", "coarse_rows", "coarse_cols")
    strides = ("stride_b", "stride_c", "stride_h")
    numbers = ("weight_0", "weight_1", "weight_2", "offset", "step", "last")
    types = (
        {"out": "*fp32", "images": "*u8"} | dict.fromkeys(integers + strides, "i32") | dict.fromkeys(numbers, "fp32")
    )
    constants = {"SIDE": 28, "LEVELS": 3, "ROWS": 4, "BINS": 512, "CHANNELS": 3, "CHUNK": 1024, "stride_w": 1}
    compile_for_gpu(
        "aptvit.patching.kernels.entropy_triton",
        "_entropy_kernel",
        types,
        constants,
        num_warps=4,
        enable_fp_fusion=False,
    )
