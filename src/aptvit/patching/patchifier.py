"""From images to the layout of their patches: scores, scales, layout. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aptvit.patching.budget import MAX_SCALES, Budget, as_thresholds
from aptvit.patching.images import ImageGroup, Images, Normalization, group_by_size
from aptvit.patching.layout import PatchLayout
from aptvit.patching.scoring import Scorer, get_scorer, shape_error
from aptvit.patching.selection import choose_scales, is_limited, needs_scores

__all__ = ["Patchifier"]


class Patchifier:
    """Cuts images into patches of several sizes.

    Args:
        patch_size: Side of a base patch in pixels.
        channels: Channels of the images.
        thresholds: From fine to coarse, see `aptvit.AdaptivePatchTransformer`.
        keep: Instead of thresholds: the share of its patch tokens that every image keeps.
        scales: Number of patch sizes, the base size included; follows from the number of thresholds. 2 by default.
        scorer: A name or a callable, see `aptvit.patching.scoring.Scorer`.
        mean: Mean that float images were normalised with.
        std: Standard deviation that float images were normalised with.
        pad: Pad images at the right and bottom to multiples of the patch size instead of refusing them.
        cut_size: (H, W) of images whose incomplete patches are cut off instead.
        num_prefix_tokens: Prefix tokens of each image.
        window_size: Side in base patches of the windows that tokens are ordered by; None for raster order.
        limits: ``blend``, ``min_keep``, ``max_tokens``, ``max_batch_tokens``, see `aptvit.patching.budget.Budget`.

    Attributes:
        budget: How many tokens images may cost. Can be replaced at any time: a call reads it once, at its start.
        scorer: The scorer. Can be replaced at any time, too.
        calibration: Record of `aptvit.calibrate` for these thresholds; None for thresholds set by hand.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        patch_size: int,
        channels: int = 3,
        *,
        thresholds: float | Sequence[float] | None = None,
        keep: float | None = None,
        scales: int | None = None,
        scorer: str | Scorer = "entropy",
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        pad: bool = False,
        cut_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
        window_size: int | None = None,
        **limits: Any,
    ) -> None:
        self.patch_size, self.channels = patch_size, channels
        self.scorer = get_scorer(scorer)
        self.scorer_name: str | None = getattr(self.scorer, "name", None)
        self.normalization = Normalization.of_channels(mean, std, channels)
        self.mean, self.std = self.normalization.mean, self.normalization.std
        self.pad, self.cut_size = pad, cut_size
        self.num_prefix_tokens, self.window_size = num_prefix_tokens, window_size
        self.calibration: dict[str, Any] | None = None
        if scales is not None and not (isinstance(scales, int) and 1 <= scales <= MAX_SCALES):
            raise ValueError(f"scales={scales} must be a whole number from 1, the base patch size, to {MAX_SCALES}")
        self._scales_of_share = 2 if scales is None else scales
        values = None if thresholds is None else as_thresholds(thresholds)
        if values is None and keep is None:
            values = (-1.0,) * (self._scales_of_share - 1)  # nothing merges
            keep = None if limits.get("blend") is None else 1.0
        self.budget = Budget(values, keep, **limits)
        if scales is not None and scales != self.num_scales:
            raise ValueError(
                f"{len(values or ())} thresholds make {self.num_scales} scales, not scales={scales}: "
                "give one threshold for each size above the base patch"
            )

    @property
    def budget(self) -> Budget:
        return self._budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        self._budget, self.calibration = value, None
        self._scales_of_share = self.num_scales

    @property
    def num_scales(self) -> int:
        """Number of patch sizes, the base size included."""
        return self._num_scales(self._budget)

    def _num_scales(self, budget: Budget) -> int:
        return self._scales_of_share if budget.thresholds is None else len(budget.thresholds) + 1

    def groups(self, images: Images) -> list[ImageGroup]:
        """Check images, and group them by size.

        Raises:
            ValueError: As for `aptvit.patching.images.group_by_size`.
        """
        if self.window_size is not None:
            return group_by_size(images, self.channels, self.patch_size * self.window_size, self.pad, unit="window")
        return group_by_size(images, self.channels, self.patch_size, self.pad, self.cut_size)

    @torch.no_grad()
    def __call__(self, groups: Sequence[ImageGroup], budget: Budget | None = None, learn: bool = False) -> PatchLayout:
        """The patches of images. Synchronises with the device once.

        Args:
            groups: The images by size.
            budget: How many tokens the images may cost; by default ``self.budget``.
            learn: Record gradients in scorers that run the blocks (`aptvit.patching.scoring.EncodingScorer`).

        Raises:
            ValueError: If the budget cannot be met, the scorer fails, or an image is not finite.
        """
        budget = self._budget if budget is None else budget
        grids = [group.grid_size(self.patch_size) for group in groups]
        sizes, cache = [len(group.index) for group in groups], None
        scores: list[Mapping[int, Tensor]] = [{} for _ in groups]
        if needs_scores(budget) and any(sizes):
            scores, cache = self._scores(groups, self._num_scales(budget), learn)
            if is_limited(budget):
                from aptvit.patching.limits import choose_within_limits

                maps = choose_within_limits(scores, grids, sizes, budget, self.num_prefix_tokens)
            else:
                per_group = zip(scores, grids, sizes, strict=True)
                maps = [choose_scales(group_scores, budget, grid, size) for group_scores, grid, size in per_group]
        else:
            maps = [torch.zeros(size, *grid, dtype=torch.int8) for size, grid in zip(sizes, grids, strict=True)]
        checked = scores if getattr(self.scorer, "name", None) is None else [{} for _ in groups]  # a user's scorer
        scale_map, finite, grid_sizes = _joined([part.to(groups[0].images.device) for part in maps], groups, checked)
        options = (self.patch_size, self._num_scales(budget), self.num_prefix_tokens, grid_sizes, self.window_size)
        layout = PatchLayout.from_scale_map(scale_map, *options, finite)
        return layout if cache is None else replace(layout, cache=cache)

    @torch.no_grad()
    def scores(self, images: Images) -> list[tuple[ImageGroup, Mapping[int, Tensor]]]:
        """Scores of all candidate patches.

        Args:
            images: (B, C, H, W), or a list of (C, H_i, W_i).

        Returns:
            For each group of images of one size, the group and for factor 2^i (b, h // 2^i, w // 2^i) scores.

        Raises:
            ValueError: If the images do not fit, or the scorer returns scores of another shape.
        """
        groups = self.groups(images)
        return list(zip(groups, self._scores(groups, self.num_scales, False)[0], strict=True))

    def _scores(
        self, groups: Sequence[ImageGroup], num_scales: int, learn: bool
    ) -> tuple[list[Mapping[int, Tensor]], Any]:
        """Scores of each group, and the cache for the encoder."""
        scorer: Any = self.scorer
        factors, cache = [2**i for i in range(1, num_scales)], None
        if not factors:
            return [{} for _ in groups], None
        if hasattr(scorer, "score_groups"):  # see EncodingScorer
            scores, cache = scorer.score_groups(groups, factors, learn)
        else:
            scores = [self._pixel_scores(scorer, group.images, factors) for group in groups]
        for group, group_scores in zip(groups, scores, strict=True):
            shapes = {f: (len(group.index), *group.grid_size(f * self.patch_size)) for f in factors}
            tensors = group_scores if isinstance(group_scores, Mapping) else {}
            if [tensors[f].shape for f in factors if isinstance(tensors.get(f), Tensor)] != list(shapes.values()):
                raise shape_error(group_scores, shapes)
        return scores, cache

    def _pixel_scores(self, scorer: Any, images: Tensor, factors: Sequence[int]) -> Mapping[int, Tensor]:
        with torch.autocast(images.device.type, enabled=False):  # pixels are compared exactly
            if hasattr(scorer, "score_images"):  # see ImageScorer
                return scorer.score_images(images, self.mean, self.std, self.patch_size, factors)
            return scorer(self.normalization.pixels(images), self.patch_size, factors)

    def with_cache(self, layout: PatchLayout, groups: Sequence[ImageGroup], learn: bool) -> PatchLayout:
        """A user's layout with the cache of a scorer that runs the blocks; unchanged with other scorers.

        Args:
            layout: The layout of the images.
            groups: The images by size.
            learn: Record gradients, as for a call.
        """
        scorer: Any = self.scorer
        if layout.is_uniform or not hasattr(scorer, "with_cache"):  # see EncodingScorer
            return layout
        return scorer.with_cache(layout, groups, learn)


def _joined(
    maps: Sequence[Tensor], groups: Sequence[ImageGroup], scores: Sequence[Mapping[int, Tensor]]
) -> tuple[Tensor, Tensor, list[Any]]:
    """Scale map of the whole batch from those of its groups; `_finite` of its images; grid of each image."""
    if len(groups) == 1:
        return maps[0], _finite(groups[0].images, scores[0]), [tuple(maps[0].shape[1:])] * len(groups[0].index)
    num_images = sum(len(group.index) for group in groups)
    height, width = (max(side) for side in zip(*(scales.shape[1:] for scales in maps), strict=True))
    scale_map = maps[0].new_full((num_images, height, width), -1)
    finite, grid_sizes = scale_map.new_ones(num_images), [(0, 0)] * num_images
    for group, scales, group_scores in zip(groups, maps, scores, strict=True):
        rows, cols = scales.shape[1:]
        scale_map[group.index, :rows, :cols] = scales
        finite[group.index] = _finite(group.images, group_scores).char()
        for image in group.index:
            grid_sizes[image] = (rows, cols)
    return scale_map, finite, grid_sizes


def _finite(images: Tensor, scores: Mapping[int, Tensor]) -> Tensor:
    """(b,) int8: 1 of finite images, 0 with other pixels, -1 with NaN scores. Does not synchronise with the device."""
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if images.is_floating_point():
        finite = images.sum((1, 2, 3), dtype=torch.float32).isfinite()
    nan = [values.isnan().any(2).any(1).to(images.device) for values in scores.values()]
    return finite * (1 - 2 * torch.stack(nan).any(0).char()) if nan else finite
