from __future__ import annotations

import re

import pytest
import torch

from aptvit.patching.images import group_by_size


def test_a_batch_is_one_group_and_not_copied() -> None:
    images = torch.rand(3, 3, 32, 48)
    (group,) = group_by_size(images, 3, 16)
    assert group.images is images
    assert group.index == [0, 1, 2]


def test_a_list_is_grouped_by_size_in_the_order_sizes_appear() -> None:
    sizes = [(32, 48), (16, 16), (32, 48), (48, 32), (16, 16)]
    images = [torch.rand(3, *size) for size in sizes]
    groups = group_by_size(images, 3, 16)
    assert [group.index for group in groups] == [[0, 2], [1, 4], [3]]
    for group in groups:
        for image, number in zip(group.images, group.index, strict=True):
            assert torch.equal(image, images[number])


def test_a_tuple_is_a_list() -> None:
    (group,) = group_by_size((torch.rand(3, 16, 16), torch.rand(3, 16, 16)), 3, 16)
    assert group.images.shape == (2, 3, 16, 16)


def test_padding_adds_zeros_at_the_right_and_bottom() -> None:
    image = torch.rand(3, 17, 31) + 1
    (group,) = group_by_size(image[None], 3, 16, pad=True)
    assert group.images.shape == (1, 3, 32, 32)
    assert torch.equal(group.images[0, :, :17, :31], image)
    assert group.images[0, :, 17:].abs().sum() == 0 and group.images[0, :, :, 31:].abs().sum() == 0


def test_padding_leaves_whole_images_alone_and_groups_by_padded_size() -> None:
    whole = torch.rand(2, 3, 32, 16)
    assert group_by_size(whole, 3, 16, pad=True)[0].images is whole
    groups = group_by_size([torch.rand(3, 30, 16), torch.rand(3, 32, 15), torch.rand(3, 33, 16)], 3, 16, pad=True)
    assert [group.index for group in groups] == [[0, 1], [2]]
    assert groups[1].images.shape == (1, 3, 48, 16)


def test_raw_pixels_stay_raw() -> None:
    images = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8)
    (group,) = group_by_size(images, 3, 16, pad=True)
    assert group.images.dtype == torch.uint8


@pytest.mark.parametrize("images", [torch.rand(0, 3, 16, 16), [], ()])
def test_no_images_are_refused(images: object) -> None:
    with pytest.raises(ValueError, match="there are no images"):
        group_by_size(images, 3, 16)  # type: ignore[arg-type]


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
    if 0 in size:
        with pytest.raises(ValueError):
            group_by_size(torch.rand(1, 3, *size), 3, 16, pad=True)


def test_raw_pixels_and_normalised_ones_stay_apart() -> None:
    raw, normalised = torch.full((3, 16, 16), 200, dtype=torch.uint8), torch.rand(3, 16, 16)
    groups = group_by_size([raw, normalised, raw], 3, 16)
    assert [group.index for group in groups] == [[0, 2], [1]]
    assert [group.images.dtype for group in groups] == [torch.uint8, torch.float32]
