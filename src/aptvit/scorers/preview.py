"""Scores by the variance of a network's outputs inside each patch, computed in a first pass over 2x patches.

A coarse patch has one token for all its cells, which does no harm where the network's outputs are the same in all of
them. The outputs for an image in 2x patches, a quarter of the tokens, locate these places nearly as well as those for
base patches. Nothing is trained, and no token is computed twice: tokens of coarse patches are those of the first pass
(`aptvit.encoder.two_pass`).

images ── all 2x patches ── blocks ── maps ── network's outputs ── variance inside each patch ── layout
                              └── tokens, keys and values of coarse patches ── second pass: fine patches only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.encoder.costs import flops_of_blocks, flops_of_coarse_embedding
from aptvit.encoder.encoder import BlockOutputs, Encoder
from aptvit.encoder.two_pass import FirstPass, run_first_pass
from aptvit.patching.features import PackedFeatures
from aptvit.patching.images import ImageGroup
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.sizes import relative_channels
from aptvit.scorers.spread import spread_of

__all__ = ["Preview", "PreviewScorer", "as_in_evaluation"]

_PLACES = 2  # places of the outputs along a side of a base patch, so that each 2x patch has 4 x 4


def _relative(maps: Sequence[Tensor]) -> Tensor:
    return relative_channels(maps[-1])


@dataclass(frozen=True, eq=False)
class Preview:
    """The outputs of a network for the first pass.

    Attributes:
        network: The whole network, which is set to evaluation mode meanwhile.
        maps: (outputs of the blocks, layout) -> (B, D, H/p, W/p) maps of some depths, the inputs of the network's head.
        answers: These maps at 2x patches -> (B, K, H', W') outputs at each place; by default the last map with
            channels relative to their variance.
        stop: Number of blocks to run; None for all.
    """

    network: nn.Module
    maps: Callable[[BlockOutputs, PatchLayout], Sequence[Tensor]]
    answers: Callable[[Sequence[Tensor]], Tensor] = _relative
    stop: int | None = None


class PreviewScorer:
    """Variance inside each patch of a network's outputs for the image in 2x patches.

    Args:
        encoder: The adaptive model's encoder.

    Attributes:
        preview: The outputs whose variance is the score; by default the last map with channels relative to their
            variance. A network around the model sets its own when it is built.
    """

    name = "preview"

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.preview: Preview | None = None

    @staticmethod
    def check_scales(num_scales: int) -> None:
        """Check that a model has no patches above 2x.

        Raises:
            ValueError: If there are more than two scales.
        """
        if num_scales > 2:
            raise ValueError(
                "scorer='preview' runs all 2x patches in its first pass, so that larger patches would save nothing: "
                f"use scales=2 or one threshold instead of {num_scales} scales"
            )

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.Scorer`, for pixels that the host reads without normalisation."""
        return self._score(ImageGroup(pixels, list(range(len(pixels)))), factors, False)[0]

    def score_groups(
        self, groups: Sequence[ImageGroup], factors: Sequence[int], learn: bool
    ) -> tuple[list[dict[int, Tensor]], FirstPass | None]:
        """As `aptvit.patching.scoring.EncodingScorer`."""
        results = [self._score(group, factors, learn) for group in groups]
        return [scores for scores, _ in results], FirstPass.of_groups([first for _, first in results], groups)

    def with_cache(self, layout: PatchLayout, groups: Sequence[ImageGroup], learn: bool) -> PatchLayout:
        """As `aptvit.patching.scoring.EncodingScorer`."""
        if layout.cache is not None and (layout.cache.learned or not learn):
            return layout
        return replace(layout, cache=self.score_groups(groups, [2], learn)[1])

    def _score(
        self, group: ImageGroup, factors: Sequence[int], learn: bool
    ) -> tuple[dict[int, Tensor], FirstPass | None]:
        self.check_scales(1 + len(factors))
        grid = group.grid_size(self.encoder.adapter.patch_size)
        if min(grid) < 2:
            count, images = len(group.index), group.images
            empty = torch.zeros(count, 0, device=images.device)
            return {factor: empty.new_zeros(count, *(side // factor for side in grid)) for factor in factors}, None
        preview = self.preview or Preview(nn.Identity(), self._last_map)
        evaluating = as_in_evaluation(preview.network, self.encoder.adapter.vit)
        with nullcontext() if learn else evaluating, torch.set_grad_enabled(learn):
            outputs, layout, first = run_first_pass(self.encoder, group, 2, preview.stop, learn)
            maps = preview.maps(outputs, layout)
        even = (grid[0] // 2 * 2, grid[1] // 2 * 2)
        with torch.no_grad(), as_in_evaluation(preview.network, self.encoder.adapter.vit):
            answers = preview.answers([image_map[:, :, : even[0] : 2, : even[1] : 2] for image_map in maps]).float()
            places = [side * _PLACES for side in even]
            answers = F.interpolate(answers, size=places, mode="bilinear", align_corners=False, antialias=True)
            return {factor: spread_of(answers, even, factor) for factor in factors}, first

    @staticmethod
    def _last_map(outputs: BlockOutputs, layout: PatchLayout) -> Sequence[Tensor]:
        maps = PackedFeatures(outputs.x[0], layout).feature_maps()
        assert isinstance(maps, Tensor)  # images of one size
        return [maps]

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.patching.scoring.CountedScorer`: the first pass, without heads."""
        adapter = self.encoder.adapter
        blocks, prefix = flops_of_blocks(adapter, len(adapter.blocks)), adapter.num_prefix_tokens
        return lambda n: float(blocks(n / 4 + prefix)) + flops_of_coarse_embedding(adapter, n)

    def tokens_of_second_pass(self, tokens: np.ndarray, num_patches: int) -> np.ndarray:
        """Number of an image's tokens in the second pass, prefix tokens included.

        Args:
            tokens: Tokens of the image, prefix tokens included.
            num_patches: Patch tokens of its uniform grid.
        """
        coarse = (num_patches + self.encoder.adapter.num_prefix_tokens - tokens) / 3  # each saves three tokens
        return tokens - coarse


@contextmanager
def as_in_evaluation(*networks: Any) -> Iterator[None]:
    """Context in which networks are in evaluation mode. Restores the mode of each module, not only of the networks."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
