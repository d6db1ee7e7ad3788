from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from aptvit.patching.images import Normalization, group_by_size


def padded(image: Tensor, multiple: int) -> np.ndarray:
    """(C, H, W) with zeros at the right and bottom, by numpy."""
    _, height, width = image.shape
    return np.pad(image.numpy(), ((0, 0), (0, -height % multiple), (0, -width % multiple)))


def test_a_batch_is_one_group_and_not_copied() -> None:
    images = torch.rand(3, 3, 32, 48)
    (group,) = group_by_size(images, 3, 16)
    assert group.images is images
    assert group.index == [0, 1, 2]
    assert group.grid_size(16) == (2, 3)


def test_a_list_is_grouped_by_size_in_the_order_sizes_appear() -> None:
    sizes = [(32, 48), (16, 16), (32, 48), (48, 32), (16, 16)]
    images = [torch.rand(3, *size) for size in sizes]
    groups = group_by_size(images, 3, 16)
    assert [group.index for group in groups] == [[0, 2], [1, 4], [3]]
    for group in groups:
        for image, number in zip(group.images, group.index, strict=True):
            assert torch.equal(image, images[number])


def test_a_tuple_is_a_list() -> None:
    images = (torch.rand(3, 16, 16), torch.rand(3, 16, 16))
    (group,) = group_by_size(images, 3, 16)
    assert group.index == [0, 1]
    assert torch.equal(group.images, torch.stack(images))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(17, 31), (32, 31), (17, 48), (1, 1)])
def test_padding_adds_zeros_at_the_right_and_bottom(size: tuple[int, int], dtype: torch.dtype) -> None:
    image = (torch.rand(3, *size) * 200 + 1).to(dtype)  # not a pixel is zero before
    for images in (image[None], [image]):
        (group,) = group_by_size(images, 3, 16, pad=True)
        assert group.images.dtype == dtype
        np.testing.assert_array_equal(group.images[0], padded(image, 16))


def test_padding_leaves_whole_images_alone_and_groups_by_padded_size() -> None:
    whole = torch.rand(2, 3, 32, 16)
    assert group_by_size(whole, 3, 16, pad=True)[0].images is whole
    images = [torch.rand(3, *size) for size in ((30, 16), (33, 16), (32, 15))]
    groups = group_by_size(images, 3, 16, pad=True)
    assert [group.index for group in groups] == [[0, 2], [1]]
    for group in groups:
        np.testing.assert_array_equal(group.images, np.stack([padded(images[i], 16) for i in group.index]))


@pytest.mark.parametrize("pad", [False, True])
def test_what_a_host_cuts_off_is_cut_off_at_that_size_only(pad: bool) -> None:
    image, other = torch.rand(3, 20, 33), torch.rand(3, 33, 20)
    for images in (image[None], [image]):
        (group,) = group_by_size(images, 3, 16, pad=pad, cut_size=(20, 33))
        np.testing.assert_array_equal(group.images[0], image.numpy()[:, :16, :32])
    if pad:
        np.testing.assert_array_equal(
            group_by_size([other], 3, 16, pad=True, cut_size=(20, 33))[0].images[0], padded(other, 16)
        )
    else:
        with pytest.raises(ValueError, match="image 0 of 33x20 pixels: sides must be multiples"):
            group_by_size([other], 3, 16, cut_size=(20, 33))


def test_an_empty_list_has_no_size_and_an_empty_batch_does() -> None:
    for images in ([], ()):
        with pytest.raises(ValueError, match=r"an empty list has no size.* tensor \(0, C, H, W\)"):
            group_by_size(images, 3, 16)
    (group,) = group_by_size(torch.rand(0, 3, 32, 16), 3, 16)
    assert group.index == [] and group.grid_size(16) == (2, 1)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 3, 16, 16), (16, 16)])
def test_a_tensor_that_is_not_a_batch_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{shape} are not a batch (B, 3, H, W)")):
        group_by_size(torch.rand(shape), 3, 16)


def test_list_entries_that_are_not_images_are_refused_by_number() -> None:
    good = torch.rand(3, 16, 16)
    with pytest.raises(ValueError, match=r"image 1 is \(1, 3, 16, 16\)"):
        group_by_size([good, good[None]], 3, 16)
    with pytest.raises(ValueError, match="image 2 is str"):
        group_by_size([good, good, "cat.jpg"], 3, 16)  # type: ignore[list-item]


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 channels, but the model reads 3"):
        group_by_size(torch.rand(1, 1, 16, 16), 3, 16)
    with pytest.raises(ValueError, match=r"image 1 .*4 channels, but the model reads 3"):
        group_by_size([torch.rand(3, 16, 16), torch.rand(4, 16, 16)], 3, 16)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool, torch.int16])
def test_whole_numbers_other_than_bytes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{dtype}.*uint8"):
        group_by_size(torch.zeros(1, 3, 16, 16, dtype=dtype), 3, 16)


@pytest.mark.parametrize(
    ("size", "near"),
    [((225, 230), "224x224 or 240x240"), ((224, 230), "224x224 or 224x240"), ((10, 40), "16x48"), ((0, 16), "")],
)
def test_sizes_that_do_not_divide_are_refused_with_the_nearest_that_do(size: tuple[int, int], near: str) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 16") as caught:
        group_by_size([torch.rand(3, 16, 16), torch.rand(3, *size)], 3, 16)
    assert f"image 1 of {size[0]}x{size[1]} pixels" in str(caught.value)
    assert f"Resize to {near}, or adapt" in str(caught.value)
    assert "pad=True" in str(caught.value)
    if 0 in size:  # nothing to pad
        with pytest.raises(ValueError, match=f"images of {size[0]}x{size[1]} pixels: sides must be"):
            group_by_size(torch.rand(1, 3, *size), 3, 16, pad=True)


def test_raw_pixels_and_normalised_ones_stay_apart() -> None:
    raw = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    normalised = torch.randn(3, 16, 16)
    groups = group_by_size([raw[0], normalised, raw[1]], 3, 16)
    assert [group.index for group in groups] == [[0, 2], [1]]
    assert [group.images.dtype for group in groups] == [torch.uint8, torch.float32]
    assert torch.equal(groups[0].images, raw) and torch.equal(groups[1].images, normalised[None])


@pytest.mark.parametrize("statistics", [((0.5,), (0.25,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
def test_pixels_are_what_was_normalised(statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    normalization = Normalization.of_channels(*statistics, 3)
    raw = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = (np.broadcast_to(np.array(values), 3).reshape(3, 1, 1) for values in statistics)
    normalised = (raw.numpy() / 255 - mean) / std
    np.testing.assert_allclose(normalization.normalised(raw), normalised, rtol=1e-5, atol=1e-6)
    for images in (raw, torch.from_numpy(normalised)):
        pixels = normalization.pixels(images)
        assert pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels, raw.numpy(), atol=1e-3)
