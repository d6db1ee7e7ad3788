from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aptvit.layers.kernels.gather_torch import gather_patches
from aptvit.patching.patchifier import Patchifier

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.5)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_rows_are_those_of_the_normalised_images(
    gather_triton: ModuleType, triton_device: str, draw_images: Callable[..., Tensor], data: st.DataObject
) -> None:
    side = data.draw(st.sampled_from([3, 14, 16, 40]))
    batch, rows, cols = (data.draw(st.integers(1, 3)) for _ in range(3))
    channels = data.draw(st.sampled_from([1, 3, 4]))
    shape = (batch, channels, rows * side + data.draw(st.integers(0, 2)), cols * side + data.draw(st.integers(0, 2)))
    images = draw_images(data, shape, triton_device, (torch.uint8, *FLOATS))
    # Triton's interpreter rounds other numbers wrongly to bfloat16.
    safe = triton_device == "cuda" or images.dtype == torch.bfloat16
    dtype = data.draw(st.sampled_from(FLOATS if safe else FLOATS[:2]))
    picked = data.draw(st.lists(st.integers(0, batch * rows * cols - 1), max_size=6))
    image, row, col = torch.unravel_index(
        torch.tensor(picked, dtype=torch.int64, device=triton_device), (batch, rows, cols)
    )
    patchifier = Patchifier(side, channels, mean=MEAN[:channels], std=STD[:channels])
    expected = gather_patches(patchifier.normalization.normalised(images).to(dtype), image, row, col, side)
    got = gather_triton.gather_patches(images, image, row, col, side, MEAN[:channels], STD[:channels], dtype)
    assert got.shape == (len(picked), channels * side**2) and got.dtype == dtype and got.is_contiguous()
    # torch divides by 255 with one more rounding on a GPU
    rounding = 4 * torch.finfo(dtype).eps if images.dtype == torch.uint8 else 0
    torch.testing.assert_close(got, expected, atol=rounding, rtol=rounding)


def test_indices_may_be_columns_of_a_table(gather_triton: ModuleType, triton_device: str) -> None:
    images = torch.randn(2, 3, 32, 48, device=triton_device)
    table = torch.tensor([[0, 1, 2], [1, 0, 0], [1, 1, 1]], device=triton_device)
    got = gather_triton.gather_patches(images, *table.unbind(1), 16, MEAN[:3], STD[:3], torch.float32)
    assert torch.equal(got, gather_patches(images, *table.unbind(1), 16))


def test_it_compiles(compile_for_gpu: Callable[..., None]) -> None:
    pointers = {"out": "*bf16", "images": "*u8", "image": "*i64", "row": "*i64", "col": "*i64", "statistics": "*fp32"}
    types = pointers | dict.fromkeys(("channels", "stride_b", "stride_c", "stride_h"), "i32")
    constants = {"SIDE": 28, "CHUNK": 1024, "NORMALISE": True, "stride_w": 1}
    compile_for_gpu(
        "aptvit.layers.kernels.gather_triton", "_gather_kernel", types, constants, num_warps=4, enable_fp_fusion=False
    )
