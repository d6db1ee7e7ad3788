"""Thresholds from a wish: half the tokens, 30 GFLOPs, 1.8 times as fast, on these images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aptvit.calibration.costs import Cost, gflops_of_tokens, merge_costs, time_of_tokens
from aptvit.patching.limits import merges_within_limits
from aptvit.scorers.learned import as_batches

if TYPE_CHECKING:
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer
    from aptvit.patching.images import ImageGroup, Images
    from aptvit.patching.patchifier import Patchifier

__all__ = ["Calibration", "Calibrator", "HeldBack", "Target", "calibrate"]


@dataclass(frozen=True)
class Target:
    """How many tokens a person asked for.

    Attributes:
        thresholds: Thresholds to use as they are.
        keep: Share of the patch tokens.
        per_image: Every photo keeps that share; otherwise thresholds are calibrated so that the average does.
        scales: Patch sizes where ``keep`` decides.
        config: Instead of all these: options of `aptvit.adapt`, as `aptvit.read_config` reads them.
    """

    thresholds: tuple[float, ...] | None = None
    keep: float = 0.5
    per_image: bool = False
    scales: int = 2
    config: Mapping[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        """What `aptvit.adapt` takes."""
        if self.config is not None:
            return dict(self.config)
        if self.thresholds is not None:
            return {"thresholds": self.thresholds}
        return {"scales": self.scales, **({"keep": self.keep} if self.per_image else {})}

    @property
    def calibrated(self) -> bool:
        return self.config is None and self.thresholds is None and not self.per_image

    def __str__(self) -> str:
        if self.config is not None:
            return "as calibrated before"
        if self.thresholds is not None:
            return "thresholds as given"
        share = f"{self.keep:.0%} of the patch tokens"
        return f"{share} of every photo" if self.per_image else f"{share} on average (calibrated on these photos)"


@dataclass(frozen=True)
class HeldBack:
    """What thresholds found on the other images give on images held back.

    Attributes:
        num_images: How many there are.
        keep_ratio: Mean share of the patch tokens.
        error: How far the wish was missed there, relative to it.
        share_quantiles: Shares of single images at 0, 5, 25, 50, 75, 95 and 100 %.
    """

    num_images: int
    keep_ratio: float
    error: float
    share_quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Thresholds and how well they meet the wish.

    Attributes:
        thresholds: From fine to coarse.
        wish: What was asked for: ``{"keep": 0.5}``, ``{"gflops": 30.0}`` or ``{"speedup": 1.8}``.
        reached: The same, as the images that were calibrated on have it.
        keep_ratio: Mean over them of patch tokens kept / patch tokens of the uniform grid.
        num_images: How many there were, those held back included.
        held_back: How it carries over, if images were held back.
    """

    thresholds: tuple[float, ...]
    target: dict[str, float]
    reached: dict[str, float]
    keep_ratio: float
    num_images: int
    held_back: HeldBack | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    model: AdaptivePatchTransformer | Patchifier,
    images: Images | Iterable[Images],
    keep: float | None = None,
    *,
    gflops: float | None = None,
    speedup: float | None = None,
) -> tuple[float, ...]:
    """Set thresholds so that these images cost what is asked for on average.

    One threshold serves all scales. Busy images keep more than the average, smooth ones fewer. One pass, in bounded
    memory. Limits of the model (``blend``, ``min_keep``, ``max_tokens``) count, ``max_batch_tokens`` does not.

    Args:
        model: The adaptive model, or a `Patchifier`; its thresholds are set.
        images: A batch, a list, or an iterable of either, read once.
        keep: Mean over the images of patch tokens kept / patch tokens of the uniform grid; 0.5 by default.
        gflops: Instead: billions of operations of the average image, a multiplication and an addition being two.
        speedup: Instead: how many times as fast as with nothing merged; measured on the first batch, so give one of
            the size that will be used.

    Returns:
        The thresholds, from fine to coarse.

    Raises:
        ValueError: If there are no images, or no threshold reaches the wish; the message names the range.
    """
    options = {"keep": keep, "gflops": gflops, "speedup": speedup}
    targets = {name: value for name, value in options.items() if value is not None}
    if len(targets) > 1:
        raise ValueError(f"give one of {' and '.join(f'{name}={value:g}' for name, value in targets.items())}")
    calibrator = None
    for batch in as_batches(images):
        if calibrator is None:
            calibrator = Calibrator.of_target(model, targets or {"keep": 0.5}, batch)
        calibrator.add(batch)
    if calibrator is None:
        raise ValueError("there are no images to calibrate on: give at least one")
    return calibrator.solve().thresholds


class Calibrator:
    """Collects what images cost at every threshold, and finds the one that meets a wish.

    An image's cost falls at each merge, and merges happen one by one as the threshold rises. So the mean cost at any
    threshold is a sum over merges: a sorted list of (score, fall in cost), which is all that is kept, thinned out to
    ``capacity`` entries. Up to that many merges the answer is exact.

    Args:
        model: The adaptive model, or a `Patchifier`.
        wish: ``{"keep": 0.5}``, or the name and value of what ``cost`` measures; ``speedup`` is the cost's inverse.
        cost: Cost of one image; the share of its patch tokens by default.
        hold_back: Hold back every n-th image from a second opinion; 0 for none. The thresholds are found on all.
        capacity: Entries to keep.

    Raises:
        ValueError: If the wish is out of range.
    """

    def __init__(
        self,
        model: AdaptivePatchTransformer | Patchifier,
        target: dict[str, float],
        cost: Cost | None = None,
        *,
        hold_back: int = 0,
        capacity: int = 1 << 20,
    ) -> None:
        ((self._name, self._value),) = target.items()
        if self._name == "keep" and not 0 < self._value <= 1:
            raise ValueError(f"keep={self._value!r} must be a share of the patch tokens in (0, 1]")
        if not self._value > 0:
            raise ValueError(f"{self._name}={self._value!r} must be more than 0")
        if model.num_scales < 2:
            raise ValueError("a model with one scale merges nothing: adapt it with scales=2 or more")
        self.model = model
        self._patchifier: Any = getattr(model, "patchifier", model)
        budget = self._patchifier.budget
        # With a blend, the share is the wish itself (or follows the thresholds, where the wish is another).
        if budget.blend is not None:
            if self._name != "keep":
                raise ValueError(f"a model with blend={budget.blend:g} is calibrated to a share: give keep=")
            budget = budget.deciding(budget.thresholds, self._value)
        else:
            budget = budget.deciding((-1.0,) * (model.num_scales - 1), None)
        self._budget = budget
        self._cost = cost or (lambda tokens, num_patches: (tokens - self._patchifier.num_prefix_tokens) / num_patches)
        self._hold_back = hold_back
        self._kept, self._held = _Steps(capacity), _Steps(capacity)
        self._shares_held = _HeldBackShares()
        self._num_seen = 0
        self._target = (self._name, self._value, model.num_scales)
        self._grain = 0.0

    @classmethod
    def of_target(
        cls,
        model: AdaptivePatchTransformer | Patchifier,
        target: dict[str, float],
        images: Images,
        *,
        hold_back: int = 0,
    ) -> Calibrator:
        """A calibrator for ``{"keep": …}``, ``{"gflops": …}`` or ``{"speedup": …}``.

        Args:
            model: The adaptive model, or for ``keep`` a `Patchifier`.
            wish: Name and value.
            images: A batch to measure time with.
            hold_back: As for the class.

        Raises:
            ValueError: If the wish is unknown or out of range, or needs a model.
        """
        (name,) = target
        cost: Cost | None = None
        if name == "gflops":
            cost = gflops_of_tokens(_adaptive(model))
        elif name == "speedup":
            batch = images if isinstance(images, Tensor) else torch.stack(list(images))
            cost = time_of_tokens(_adaptive(model), batch)
        elif name != "keep":
            raise ValueError(f"unknown wish {name!r}: use keep, gflops or speedup")
        return cls(model, target, cost, hold_back=hold_back)

    def add(self, images: Images) -> None:
        """Take images into account."""
        self.add_scored(self.model.scores(images))

    def add_scored(self, scored: Sequence[tuple[ImageGroup, Mapping[int, Tensor]]]) -> None:
        """The same for images whose scores are known, from ``model.scores``: several wishes need them once."""
        for group, scores in scored:
            grid = (group.images.shape[2] // self.model.patch_size, group.images.shape[3] // self.model.patch_size)
            if 0 in grid:
                height, width = group.images.shape[2:]
                raise ValueError(f"images of {height}x{width} pixels hold no patch of {self.model.patch_size}")
            costs = merge_costs(scores, len(group.images)).sort(dim=1).values.cpu().numpy()  # (b, merges)
            shares, falls = self._curve(math.prod(grid), costs.shape[1])
            for row in costs:
                self._num_seen += 1
                is_held_back = self._hold_back > 0 and self._num_seen % self._hold_back == 0
                (self._held if is_held_back else self._kept).add(row, shares, falls)
                if is_held_back:
                    self._shares_held.add(row, shares)

    def _curve(self, num_patches: int, available: int) -> tuple[np.ndarray, np.ndarray]:
        """(merges + 1,) share and cost of an image after each of its merges, within the limits."""
        if self._budget.keep is not None:  # a share alone comes in whole merges
            self._grain = max(self._grain, 1.51 / num_patches)
        prefix = self._patchifier.num_prefix_tokens
        by_thresholds = torch.arange(available + 1)
        merges = merges_within_limits(self._budget, by_thresholds, num_patches, available, prefix).numpy()
        patches = num_patches - 3 * merges
        return patches / num_patches, self._cost(patches + prefix, num_patches)

    def solve(self) -> Calibration:
        """Find the thresholds and set them.

        Raises:
            ValueError: If there were no images, or no threshold meets the wish; the message names the range.
        """
        if self._num_seen == 0:
            raise ValueError("there are no images to calibrate on: give at least one")
        steps = self._kept.joined(self._held)
        threshold, share, cost = steps.solve(*self._target, self._grain)
        held_back = None
        if self._held.num_images and self._kept.num_images:
            threshold_of_others, _, _ = self._kept.solve(*self._target, self._grain)
            mean_share, mean_cost = self._held.means_at(threshold_of_others)
            quantiles = np.quantile(self._shares_held.at(threshold_of_others), (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
            error = _as_cost(self._name, mean_cost) / self._value - 1
            held_back = HeldBack(self._held.num_images, mean_share, error, tuple(map(float, quantiles)))
        thresholds = (threshold,) * (self.model.num_scales - 1)
        self._patchifier.budget = self._budget.deciding(thresholds, self._budget.keep)
        calibration = Calibration(
            thresholds,
            {self._name: self._value},
            {self._name: _as_cost(self._name, cost)},
            share,
            steps.num_images,
            held_back,
        )
        self._patchifier.calibration = calibration.to_dict()
        return calibration


class _Steps:
    """Falls of the mean share and the mean cost, by the score at which they happen."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts: list[np.ndarray] = []  # (n, 3): score, fall of the share, fall of the cost
        self._entries = 0
        self._totals = np.zeros(2)
        self.num_images = 0

    def add(self, scores: np.ndarray, shares: np.ndarray, costs: np.ndarray) -> None:
        """One image. scores: (merges,), sorted; shares, costs: (merges + 1,) after each merge."""
        self.num_images += 1
        self._totals += (shares[0], costs[0])
        part = np.stack([scores.astype(np.float64), shares[:-1] - shares[1:], costs[:-1] - costs[1:]], axis=1)
        self._parts.append(part[np.isfinite(scores)])
        self._entries += len(self._parts[-1])
        if self._entries > 2 * self._capacity:
            self._parts = [_thinned(self._sorted(), self._capacity)]
            self._entries = len(self._parts[0])

    def joined(self, other: _Steps) -> _Steps:
        """The images of both."""
        steps = _Steps(self._capacity)
        steps._parts = self._parts + other._parts
        steps._totals = self._totals + other._totals
        steps.num_images = self.num_images + other.num_images
        return steps

    def _sorted(self) -> np.ndarray:
        steps = np.concatenate(self._parts) if self._parts else np.zeros((0, 3))
        return steps[steps[:, 0].argsort(kind="stable")]

    def means_at(self, threshold: float) -> tuple[float, float]:
        """Mean share and mean cost where everything strictly below the threshold is merged."""
        steps = self._sorted()
        share, cost = (self._totals - steps[steps[:, 0] < threshold, 1:].sum(0)) / self.num_images
        return float(share), float(cost)

    def solve(self, name: str, value: float, num_scales: int, grain: float) -> tuple[float, float, float]:
        """The threshold, half-way between two scores, whose mean cost is nearest. -> threshold, share, cost."""
        target_cost = _as_cost(name, value)
        steps = self._sorted()
        scores = np.unique(steps[:, 0])
        if not len(scores):
            raise ValueError(f"these images are too small to hold a coarse patch: {name}={value:g} cannot be reached")
        # (scores + 1, 2): means where the first n scores are merged
        ends = np.searchsorted(steps[:, 0], scores, side="right")
        falls = np.concatenate([np.zeros((1, 2)), steps[:, 1:].cumsum(0)])[np.concatenate([[0], ends])]
        means = (self._totals - falls) / self.num_images
        costs = means[:, 1]
        least, most = costs.min(), costs.max()
        slack = max(0.005 * most, grain)
        if not least - slack <= target_cost <= most + slack:
            low, high = sorted((_as_cost(name, least), _as_cost(name, most)))
            raise ValueError(
                f"{name}={value:g} cannot be reached on these images with {num_scales} scales: from {low:.3g} to "
                f"{high:.3g} is possible. Ask for something between, or give more scales"
            )
        best = int(np.abs(costs - target_cost).argmin())
        share, cost = means[best]
        return _between(scores, best), float(share), float(cost)


def _as_cost(name: str, value: float) -> float:
    """A wish as the cost that meets it, and the other way round."""
    return 1 / value if name == "speedup" else value


def _between(scores: np.ndarray, count: int) -> float:
    """A threshold that the ``count`` lowest of these sorted scores lie strictly below, and no other."""
    if count == 0:
        return float(scores[0])
    if count == len(scores):
        return float(np.nextafter(np.float32(scores[-1]), np.float32(np.inf)))
    middle = float(np.float32((scores[count - 1] + scores[count]) / 2))  # scores are compared as float32
    return middle if middle > scores[count - 1] else float(scores[count])


def _thinned(steps: np.ndarray, capacity: int) -> np.ndarray:
    """Sorted steps, neighbours joined until ``capacity`` are left: falls add up, at the score of the last."""
    ends = np.linspace(0, len(steps), capacity + 1).astype(int)[1:]
    falls = np.concatenate([np.zeros((1, 2)), steps[:, 1:].cumsum(0)])[np.concatenate([[0], ends])]
    return np.column_stack([steps[ends - 1, 0], np.diff(falls, axis=0)])


class _HeldBackShares:
    """What single images keep at a threshold yet to be found: a random choice of at most ``capacity`` of them."""

    def __init__(self, capacity: int = 512) -> None:
        self._capacity = capacity
        self._random = np.random.default_rng(0)
        self._images: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_seen = 0

    def add(self, scores: np.ndarray, shares: np.ndarray) -> None:
        self._num_seen += 1
        place = len(self._images) if len(self._images) < self._capacity else int(self._random.integers(self._num_seen))
        if place == len(self._images):
            self._images.append((scores, shares))
        elif place < self._capacity:
            self._images[place] = (scores, shares)

    def at(self, threshold: float) -> list[float]:
        """Share of each image where everything strictly below the threshold is merged."""
        return [float(shares[np.searchsorted(scores, threshold, side="left")]) for scores, shares in self._images]


def _adaptive(model: AdaptivePatchTransformer | Patchifier) -> AdaptivePatchTransformer:
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

    if not isinstance(model, AdaptivePatchTransformer):
        raise ValueError("operations are those of a model: calibrate the model, or give keep=")
    return model
