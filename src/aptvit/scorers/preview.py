"""Where does what a network says differ? It reads all of a picture coarsely first, and finely only where that tells.

A big patch gives one token to all cells that it covers, which does no harm where the network says the same of all of
them. What it says of a picture that is read in patches of twice the side, a quarter of the tokens, tells nearly as well
where that is as what it says of the finely read one. Nothing is taught, and nothing is read twice: what is known of
patches that stay coarse is what the first pass made of them (`aptvit.encoder.passes`).

images ── all in 2x patches ── blocks ── maps ── answers ── their spread inside each patch ── layout
                                  └── tokens, keys and values ── of coarse patches ── second pass: fine patches alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.encoder.costs import flops_of_blocks
from aptvit.encoder.first_pass import FirstPass
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.spread import relative_channels, spread_of

if TYPE_CHECKING:
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["PreviewScorer", "as_in_evaluation"]

_PLACES = 2  # of answers along a side of a base patch, so that each 2x patch has 4 x 4

# (B, C, H, W) normalised images and their layout -> (B, D, H/p, W/p) maps of some depths
MapsOf = Callable[[Tensor, PatchLayout], Sequence[Tensor]]
# Those maps, of 2x patches -> (B, K, H', W') what the network says of each place
AnswersOf = Callable[[Sequence[Tensor]], Tensor]


class PreviewScorer:
    """Variance inside a patch of what the network says of a picture that is read in patches of twice the side.

    Args:
        model: The adaptive model, which reads it.

    Attributes:
        network: Who answers: what is around the model, or the model itself.
        maps: What its head reads; by default the model's last map.
        answers: What it says; by default that map, each channel relative to how much it varies.
    """

    name = "preview"

    def __init__(self, model: AdaptivePatchTransformer) -> None:
        self.model = model
        self._first_pass: FirstPass | None = None
        self.ask(model, self._last_map)

    def ask(self, network: nn.Module, maps: MapsOf, answers: AnswersOf | None = None) -> None:
        """Let another network answer, and no other: a network around the model does it when it is built."""
        self.network, self.maps, self.answers = network, maps, answers or _relative

    @staticmethod
    def check_scales(num_scales: int) -> None:
        """Raise a ValueError if there are other patches than base patches and those of twice the side."""
        if num_scales > 2:
            raise ValueError(
                "scorer='preview' reads all in patches of twice the side, so that bigger ones would save nothing: "
                f"use scales=2 or one threshold instead of {num_scales} scales"
            )

    def _last_map(self, images: Tensor, layout: PatchLayout) -> Sequence[Tensor]:
        last: list[Tensor] = self.model.forward_intermediates(images, indices=1, intermediates_only=True, layout=layout)
        return last

    def take_first_pass(self) -> FirstPass | None:
        """What the blocks left of the images that were scored last; forgotten here."""
        first, self._first_pass = self._first_pass, None
        return first

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.Scorer`, of pixels that the host would read as they are."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.ImageScorer`."""
        self.check_scales(1 + len(factors))
        grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
        self._first_pass = None
        if min(grid) < 2:
            return {factor: images.new_zeros(len(images), *(side // factor for side in grid)) for factor in factors}
        layout, even = self._coarse_layout(images), (grid[0] // 2 * 2, grid[1] // 2 * 2)
        learned = torch.is_grad_enabled()
        mode = nullcontext() if learned else as_in_evaluation(self.network, self.model)
        with mode, self.model._blocks.first_pass() as left:
            maps = self.maps(images, layout)
        self._first_pass = FirstPass(layout.restore_index, left, self.model.window_size, learned)
        with torch.no_grad(), as_in_evaluation(self.network, self.model):
            said = self.answers([one[:, :, : even[0] : 2, : even[1] : 2] for one in maps]).float()
            places = [side * _PLACES for side in even]
            said = F.interpolate(said, size=places, mode="bilinear", align_corners=False, antialias=True)
            return {factor: spread_of(said, even, factor) for factor in factors}

    def _coarse_layout(self, images: Tensor) -> PatchLayout:
        model, (height, width) = self.model, images.shape[2:]
        grid = (height // model.patch_size, width // model.patch_size)
        its = (model.patch_size, model.num_scales, model.num_prefix_tokens, model.window_size, images.device)
        return PatchLayout.uniform(len(images), grid, *its, scale=1)

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.patching.scoring.CountedScorer`, without heads: the first pass."""
        blocks = flops_of_blocks(self.model, len(self.model.adapter.blocks))
        per_patch, prefix = 2 * self.model.adapter.patch_weight()[0].numel(), self.model.num_prefix_tokens
        return lambda num_patches: float(blocks(num_patches / 4 + prefix)) + per_patch * num_patches

    def rows_of_second_pass(self, tokens: np.ndarray, num_patches: int) -> np.ndarray:
        """As `aptvit.patching.scoring.ReadsTwice`."""
        coarse = (num_patches + self.model.num_prefix_tokens - tokens) / 3  # each is three tokens less
        return tokens - coarse


def _relative(maps: Sequence[Tensor]) -> Tensor:
    return relative_channels(maps[-1])


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
