"""Necks of ViTDet and EVA-02: levels of several sizes from maps of one size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = ["DepthPyramid", "SimplePyramid"]


class SimplePyramid(nn.Module):
    """ViTDet's neck: the last map at four times, twice, once, half and a quarter of its size.

    Args:
        dim: Channels of the map.
        out_channels: Channels of each level.
    """

    def __init__(self, dim: int, out_channels: int = 256) -> None:
        super().__init__()
        self.out_channels = out_channels
        half, quarter = dim // 2, dim // 4
        larger = nn.Sequential(
            nn.ConvTranspose2d(dim, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )
        steps: list[tuple[nn.Module, int]] = [(larger, quarter), (nn.ConvTranspose2d(dim, half, 2, stride=2), half)]
        steps += [(nn.Identity(), dim), (nn.MaxPool2d(2), dim)]
        self.levels = nn.ModuleList(nn.Sequential(step, *_lateral(width, out_channels)) for step, width in steps)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, D, h, w) -> levels "0" to "3" and "pool", from (B, out_channels, 4 h, 4 w) to a quarter of (h, w)."""
        levels = OrderedDict((str(i), level(x)) for i, level in enumerate(self.levels))
        levels["pool"] = F.max_pool2d(levels["3"], kernel_size=1, stride=2)
        return levels


def _lateral(width: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]


class DepthPyramid(nn.Module):
    """EVA-02's neck for segmentation: maps of four depths at four times, twice, once and half their size.

    Args:
        dim: Channels of the maps, and of the levels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        larger = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, stride=2),
        )
        self.levels = nn.ModuleList([larger, nn.ConvTranspose2d(dim, dim, 2, 2), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w), from early to late -> four levels, from (B, D, 4 h, 4 w) to (B, D, h/2, w/2)."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]
