"""Rotary positions of coarse patches are those of their centres, also on grids of few rows: by the hosts' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import aptvit

GRIDS = [(1, 12), (2, 12), (3, 9), (12, 2), (2, 2), (4, 4), (4, 7), (8, 8)]


def centres(side: int, factor: int) -> Tensor:
    """Centres of the complete patches along a side, in base patches from the edge of the image."""
    return (torch.arange(side // factor).double() + 0.5) * factor


def expected_of_dinov3(grid: tuple[int, int], factor: int, periods: Tensor) -> Tensor:
    """Sines, then cosines of 2 pi x / period of coordinates in -1..1."""
    row, col = (2 * centres(side, factor) / side - 1 for side in grid)
    places = torch.stack(torch.meshgrid(row, col, indexing="ij"), -1).flatten(0, 1)  # (n, 2)
    angles = (2 * math.pi * places[:, :, None] / periods.double()).flatten(1).repeat(1, 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def host_of_timm() -> tuple[Any, Tensor]:
    host = timm.create_model("vit_small_patch16_dinov3", depth=1).eval()
    return host, host.rope.periods


def host_of_transformers() -> tuple[Any, Tensor]:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DINOv3ViTConfig(**sizes, image_size=64, patch_size=16)
    return DINOv3ViTModel(config).eval(), config.rope_theta ** torch.linspace(0, 1, 9)[:8]


@pytest.mark.parametrize("make", [host_of_timm, host_of_transformers])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_of_dinov3(make: Any, grid: tuple[int, int]) -> None:
    host, periods = make()
    model = aptvit.adapt(host, scales=3)
    for factor, (_, rotary) in zip((1, 2, 4), model.packed_encoder.positions_of_scales(grid, 3), strict=True):
        expected = expected_of_dinov3(grid, factor, periods)
        assert rotary is not None and rotary.shape == expected.shape
        torch.testing.assert_close(rotary.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_of_eva(name: str, grid: tuple[int, int]) -> None:
    """EVA-02 and the perception encoder: places are counted in patches, scaled to a reference grid."""
    host: Any = timm.create_model(name, depth=1).eval()
    rope, reference = host.rope, host.rope.ref_feat_shape
    model = aptvit.adapt(host, scales=3)
    for factor, (_, rotary) in zip((1, 2, 4), model.packed_encoder.positions_of_scales(grid, 3), strict=True):
        sides = zip(grid, reference, strict=True)
        row, col = ((centres(side, factor) - 0.5 + rope.grid_offset) / side * ref for side, ref in sides)
        places = torch.stack(torch.meshgrid(row, col, indexing="ij"), -1).flatten(0, 1)
        if rope.grid_indexing == "xy":
            places = places.flip(1)
        angles = (places[:, :, None] * rope.bands.double()).repeat_interleave(2, -1).flatten(1)
        expected = torch.cat([angles.sin(), angles.cos()], dim=-1)
        assert rotary is not None
        torch.testing.assert_close(rotary.double(), expected, atol=1e-5, rtol=0)


def test_a_thin_image_with_nothing_merged_is_the_host() -> None:
    host: Any = timm.create_model("vit_small_patch16_dinov3", depth=2, dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 32, 128)
    with torch.no_grad():
        torch.testing.assert_close(aptvit.adapt(host)(images), host(images), atol=1e-4, rtol=1e-4)
