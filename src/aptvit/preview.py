"""Where does what a network says differ? It reads a smaller picture first, and finely only where that tells.

A big patch gives one token to all cells that it covers, which does no harm where the network says the same of all of
them. What it says of a picture half as large, a quarter of the tokens, tells nearly as well where that is as what it
says of the whole. Nothing is taught, and attention over a quarter of the tokens is a sixteenth of the operations: the
larger pictures are, the less it costs.

images ── half the size ── the network, nothing merged ── maps ── answers ── their spread inside each patch
                                                            └── stand in the final maps where patches are coarse

What was seen of the smaller picture is not thrown away: it saw each cell of 2x patches as a patch of its own, so where
patches are coarse its maps are better than what their tokens say. Those tokens are then context for the others, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.costs import flops_of_blocks
from aptvit.layout import PatchLayout
from aptvit.spread import relative_channels, spread_of

if TYPE_CHECKING:
    from aptvit.model import AdaptivePatchTransformer

__all__ = ["PreviewScorer", "as_in_evaluation"]

_SHRINK = 2
_PLACES = 2  # of answers along a side of a base patch, so that each 2x patch has 4 x 4

# (B, C, H, W) normalised images and their layout -> (B, D, h, w) maps of some depths
MapsOf = Callable[[Tensor, PatchLayout], Sequence[Tensor]]
# Those maps -> (B, K, H', W') what the network says of each place
AnswersOf = Callable[[Sequence[Tensor]], Tensor]


class PreviewScorer:
    """Variance inside a patch of what the network says of a smaller picture.

    Args:
        model: The adaptive model, which reads that picture with nothing merged.

    Attributes:
        network: Who answers: what is around the model, or the model itself.
        maps: What its head reads; by default the model's last map.
        answers: What it says; by default that map, each channel relative to how much it varies.
        stands_in: The maps are to stand where patches are coarse.
    """

    name = "preview"

    def __init__(self, model: AdaptivePatchTransformer) -> None:
        self.model = model
        self.network: nn.Module = model
        self.maps: MapsOf = self._last_map
        self.answers: AnswersOf = _relative
        self.stands_in = False
        self._seen: tuple[Tensor, ...] = ()

    def _last_map(self, images: Tensor, layout: PatchLayout) -> Sequence[Tensor]:
        last: list[Tensor] = self.model.forward_intermediates(images, indices=1, intermediates_only=True, layout=layout)
        return last

    def take_maps(self) -> tuple[Tensor, ...]:
        """(B, D, h, w) each: what was seen of the images that were scored last, and is to stand in; forgotten here."""
        seen, self._seen = self._seen, ()
        return seen

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.scoring.Scorer`, of pixels that the host would read as they are."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    @torch.no_grad()
    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.scoring.ImageScorer`."""
        rows, cols = (side // patch_size for side in images.shape[2:])
        if min(rows, cols) < 2:
            return {factor: images.new_zeros(len(images), rows // factor, cols // factor) for factor in factors}
        small, window = self._small(images, (rows, cols)), self.model.window_size or 1
        grid = (small.shape[2] // patch_size, small.shape[3] // patch_size)
        padded = F.pad(small, (0, -grid[1] % window * patch_size, 0, -grid[0] % window * patch_size))
        layout = PatchLayout.uniform(
            len(images),
            (padded.shape[2] // patch_size, padded.shape[3] // patch_size),
            patch_size,
            self.model.num_scales,
            self.model.num_prefix_tokens,
            self.model.window_size,
            images.device,
        )
        with as_in_evaluation(self.network, self.model):
            maps = self.maps(padded, layout)
            said = self.answers(maps).float()
        maps, (said,) = (_without_padding(ones, grid, layout.grid_sizes[0]) for ones in (maps, [said]))
        self._seen = tuple(maps) if self.stands_in else ()
        places = (_PLACES * rows, _PLACES * cols)
        said = F.interpolate(said, size=places, mode="bilinear", align_corners=False, antialias=True)
        return {factor: spread_of(said, (rows, cols), factor) for factor in factors}

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.scoring.CountedScorer`, without heads: all blocks over the smaller picture."""
        blocks = flops_of_blocks(self.model, len(self.model.adapter.blocks))
        per_patch, prefix = 2 * self.model.adapter.patch_weight()[0].numel(), self.model.num_prefix_tokens

        def flops(num_patches: int) -> float:
            seen = num_patches / _SHRINK**2
            return float(blocks(seen + prefix)) + per_patch * seen

        return flops

    def _small(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pictures with half of the patches on each side. (B, C, H, W) -> (B, C, h p, w p)"""
        patchifier, patch_size = self.model.patchifier, self.model.patch_size
        size = [-(-side // _SHRINK) * patch_size for side in grid]
        whole = patchifier.normalised(images)[:, :, : grid[0] * patch_size, : grid[1] * patch_size].float()
        small = F.interpolate(whole, size=size, mode="bilinear", align_corners=False, antialias=True)
        return small.to(self.model.adapter.patch_weight()[0].dtype)


def _relative(maps: Sequence[Tensor]) -> Tensor:
    return relative_channels(maps[-1])


def _without_padding(maps: Sequence[Tensor], grid: tuple[int, int], padded: tuple[int, int]) -> list[Tensor]:
    """The part of each map that a smaller grid in the corner covers."""
    sides = [
        [have * its // all_of_it for have, its, all_of_it in zip(one.shape[2:], grid, padded, strict=True)]
        for one in maps
    ]
    return [one[:, :, :height, :width] for one, (height, width) in zip(maps, sides, strict=True)]


@contextmanager
def as_in_evaluation(network: nn.Module, model: AdaptivePatchTransformer) -> Iterator[None]:
    """Module by module, and back to what each was: some of a network in training are not.

    Args:
        network: All of it.
        model: The adaptive model inside.
    """
    vit: Any = model.adapter.vit
    training = [module for module in (*network.modules(), *model.modules(), vit) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
