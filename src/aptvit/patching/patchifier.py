"""The first two stages together: from images to the layout of their patches. No model is needed for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from aptvit.encoder.first_pass import FirstPass
from aptvit.patching.images import ImageGroup, Images, group_by_size
from aptvit.patching.layout import PatchLayout
from aptvit.patching.scoring import ReadsTwice, Scorer, get_scorer
from aptvit.patching.selection import Budget, choose_scales

__all__ = ["Patchifier"]


class Patchifier:
    """Decides which patches an image is cut into.

    Args:
        patch_size: Side of a base patch in pixels.
        channels: Channels of the images.
        thresholds: From fine to coarse, see `aptvit.AdaptivePatchTransformer`.
        keep: Instead of thresholds: the share of its patch tokens that every image keeps.
        scales: Patch sizes, the base size included; with thresholds it follows from their number. 2 by default.
        scorer: A name or a callable.
        mean: Mean that float images were normalised with.
        std: Standard deviation that float images were normalised with.
        pad: Pad images at the right and bottom to multiples of the patch size instead of refusing them.
        cut_size: (H, W) of images whose incomplete patches are cut off instead.
        num_prefix_tokens: Prefix tokens at the front of each image's run.
        window_size: Side in base patches of the windows that tokens are ordered by; None for raster order.
        limits: ``blend``, ``min_keep``, ``max_tokens``, ``max_batch_tokens``, see `aptvit.patching.selection.Budget`.

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
        self.patch_size = patch_size
        self.channels = channels
        self.scorer_name = scorer if isinstance(scorer, str) else getattr(scorer, "name", None)
        self.scorer = get_scorer(scorer)
        self.mean = _per_channel("mean", mean, channels)
        self.std = _per_channel("std", std, channels)
        self.pad = pad
        self.cut_size = cut_size
        self.num_prefix_tokens = num_prefix_tokens
        self.window_size = window_size
        self.calibration: dict[str, Any] | None = None
        if scales is not None and scales < 1:
            raise ValueError(f"scales={scales} must be at least 1, the base patch size")
        given = None if thresholds is None else _thresholds(thresholds)
        self._num_scales = 2 if scales is None else scales
        if given is not None:
            self._num_scales = len(given) + 1
        elif keep is None:
            given = (-1.0,) * (self._num_scales - 1)  # nothing merges
            keep = None if limits.get("blend") is None else 1.0
        self._budget = Budget(given, keep, **limits)
        if scales is not None and scales != self.num_scales:
            raise ValueError(
                f"{len(given or ())} thresholds make {self.num_scales} scales, not scales={scales}: "
                "give one threshold for each size above the base patch"
            )

    @property
    def budget(self) -> Budget:
        """How many tokens images may cost. Can be set at any time; its thresholds decide the number of scales."""
        return self._budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        self._budget, self.calibration = value, None
        if value.thresholds is not None:
            self._num_scales = len(value.thresholds) + 1

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Thresholds from fine to coarse; None while ``keep`` alone decides. Can be set at any time."""
        return self._budget.thresholds

    @thresholds.setter
    def thresholds(self, value: float | Sequence[float]) -> None:
        self.budget = self._budget.deciding(_thresholds(value), None if self._budget.blend is None else self.keep)

    @property
    def keep(self) -> float | None:
        """Share of its patch tokens that every image keeps; None while thresholds decide. Can be set at any time."""
        return self._budget.keep

    @keep.setter
    def keep(self, value: float) -> None:
        self.budget = self._budget.deciding(None if self._budget.blend is None else self.thresholds, float(value))

    @property
    def num_scales(self) -> int:
        """Number of patch sizes, the base size included."""
        return self._num_scales

    def settings(self) -> dict[str, Any]:
        """The options that `aptvit.adapt` takes to cut images as this does; JSON.

        Raises:
            ValueError: If the scorer is a function, which a file cannot hold.
        """
        if self.scorer_name is None:
            raise ValueError("a scorer that is a callable cannot be saved: save state_dict() and adapt() with it again")
        kept = {"scales": self.num_scales, "scorer": self.scorer_name, "mean": self.mean, "std": self.std}
        return {**asdict(self.budget), **kept, "pad": self.pad}

    def groups(self, images: Images) -> list[ImageGroup]:
        """The images by size, checked."""
        if self.window_size is not None:
            return group_by_size(images, self.channels, self.patch_size * self.window_size, self.pad, unit="window")
        return group_by_size(images, self.channels, self.patch_size, self.pad, self.cut_size)

    @torch.no_grad()
    def scores(self, images: Images) -> list[tuple[ImageGroup, dict[int, Tensor]]]:
        """Scores of every candidate patch, for each group of images of one size."""
        scores = [(group, self._scores(group.images)) for group in self.groups(images)]
        self._take_first_pass()
        return scores

    @torch.no_grad()
    def layout(self, groups: Sequence[ImageGroup], learn: bool = False) -> PatchLayout:
        """Which patches the images are cut into. Waits for the device once.

        Args:
            groups: The images by size.
            learn: As for `with_first_pass`.
        """
        grids = [self._grid(group) for group in groups]
        sizes = [len(group.index) for group in groups]
        first_pass = None
        if self._budget.needs_scores:
            scores, first_pass = self._scores_and_first_pass(groups, learn)
            maps = choose_scales(scores, grids, sizes, self._budget, self.num_prefix_tokens)
            maps = [one.to(group.images.device) for one, group in zip(maps, groups, strict=True)]
        else:
            device = groups[0].images.device
            maps = [
                torch.zeros(size, *grid, dtype=torch.int8, device=device)
                for size, grid in zip(sizes, grids, strict=True)
            ]
        num_images = sum(sizes)
        grid_sizes = [grids[0]] * num_images
        scale_map, finite = maps[0], _finite(groups[0].images)
        if len(groups) > 1:
            largest = [max(side) for side in zip(*grids, strict=True)]
            scale_map = maps[0].new_full((num_images, *largest), -1)
            finite = finite.new_ones(num_images)
            for group, grid, one in zip(groups, grids, maps, strict=True):
                scale_map[group.index, : grid[0], : grid[1]] = one
                finite[group.index] = _finite(group.images)
                for image in group.index:
                    grid_sizes[image] = grid
        layout = PatchLayout.from_scale_map(
            scale_map,
            self.patch_size,
            self.num_scales,
            self.num_prefix_tokens,
            grid_sizes,
            self.window_size,
            finite=finite,
        )
        return layout if first_pass is None else replace(layout, first_pass=first_pass)

    def with_first_pass(self, layout: PatchLayout, groups: Sequence[ImageGroup], learn: bool) -> PatchLayout:
        """A layout that says where patches are, and what a preview left of these images, if there is one.

        Args:
            layout: Of the images.
            groups: The images by size.
            learn: The first pass is to be learned: one without gradients is made anew.
        """
        if layout.is_uniform or not isinstance(self.scorer, ReadsTwice):
            return layout
        if layout.first_pass is not None and (layout.first_pass.learned or not learn):
            return layout
        return replace(layout, first_pass=self._scores_and_first_pass(groups, learn)[1])

    def _scores_and_first_pass(
        self, groups: Sequence[ImageGroup], learn: bool
    ) -> tuple[list[dict[int, Tensor]], FirstPass | None]:
        scores, passes = [], []
        for group in groups:
            with torch.set_grad_enabled(learn and isinstance(self.scorer, ReadsTwice)):
                scores.append(self._scores(group.images))
            passes.append(self._take_first_pass())
        return scores, FirstPass.of_groups(passes, groups)

    def _take_first_pass(self) -> FirstPass | None:
        """What a preview left while it scored, see `aptvit.scorers.preview`."""
        return self.scorer.take_first_pass() if isinstance(self.scorer, ReadsTwice) else None

    def check_layout(self, layout: PatchLayout, groups: Sequence[ImageGroup]) -> None:
        """Make sure that a layout is one of these images.

        Raises:
            ValueError: If it was made for another model, or for images of other sizes.
        """
        mine = (self.patch_size, self.num_prefix_tokens)
        if (layout.patch_size, layout.num_prefix_tokens) != mine:
            got = (layout.patch_size, layout.num_prefix_tokens)
            raise ValueError(f"the layout has (patch size, prefix tokens) {got}, the model {mine}: use model.layout")
        if (layout.window_packing is None) != (self.window_size is None):
            raise ValueError("the layout and the model do not agree on windows: use model.layout")
        grids = {i: self._grid(group) for group in groups for i in group.index}
        if layout.grid_sizes != [grids[i] for i in range(len(grids))]:
            raise ValueError(
                f"the layout is of {layout.num_images} images, the first with {layout.grid_sizes[0]} patches; "
                f"these are {len(grids)}, the first with {grids[0]}: use model.layout on the same images"
            )

    def _grid(self, group: ImageGroup) -> tuple[int, int]:
        return group.images.shape[2] // self.patch_size, group.images.shape[3] // self.patch_size

    def _scores(self, images: Tensor) -> dict[int, Tensor]:
        factors = [2**i for i in range(1, self.num_scales)]
        if not factors:
            return {}
        # What reads pixels does it exactly; a first pass is the network, in the precision that it runs in.
        exactly = torch.autocast(images.device.type, enabled=False)
        with nullcontext() if isinstance(self.scorer, ReadsTwice) else exactly:
            score_images = getattr(self.scorer, "score_images", None)  # see ImageScorer
            if score_images is not None:
                scores = score_images(images, self.mean, self.std, self.patch_size, factors)
            else:
                scores = self.scorer(self.pixels(images), self.patch_size, factors)
        for factor in factors:
            side = factor * self.patch_size
            expected = (len(images), images.shape[2] // side, images.shape[3] // side)
            if factor not in scores or tuple(scores[factor].shape) != expected:
                got = tuple(scores[factor].shape) if factor in scores else None
                raise ValueError(f"the scorer must give scores of shape {expected} for factor {factor}, it gave {got}")
        return scores

    def pixels(self, images: Tensor) -> Tensor:
        """Images as they were before they were normalised, (B, C, H, W) float32 in 0..255; raw ones as they are."""
        if images.dtype == torch.uint8:
            return images.float()
        mean, std = self._statistics(images.device)
        return torch.addcmul(mean * 255, images.float(), std * 255)

    def normalised(self, images: Tensor) -> Tensor:
        """Images as a model reads them: floats as they are, raw uint8 pixels normalised."""
        if images.dtype != torch.uint8:
            return images
        mean, std = self._statistics(images.device)
        return (images.float() / 255 - mean) / std

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(1, C, 1, 1) mean and standard deviation."""
        mean, std = torch.tensor([self.mean, self.std])[:, None, :, None, None].to(device, non_blocking=True)
        return mean, std


def _finite(images: Tensor) -> Tensor:
    """(b,) whether an image holds numbers only, without waiting for the device."""
    if not images.is_floating_point():
        return torch.ones(len(images), dtype=torch.bool, device=images.device)
    return images.sum((1, 2, 3), dtype=torch.float32).isfinite()


def _thresholds(value: float | Sequence[float]) -> tuple[float, ...]:
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    if not all(isinstance(one, (int, float)) for one in values):
        raise ValueError(f"thresholds must be numbers, one for each size above the base patch; got {value!r}")
    return tuple(map(float, values))


def _per_channel(name: str, given: Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(map(float, given))
    if len(values) == 1:
        values *= channels
    if len(values) != channels:
        raise ValueError(f"{name}={values} has {len(values)} values for {channels} channels: give one for each")
    return values
