"""Thresholds from a target on given images: a share of the tokens, GFLOPs or a speed-up."""

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
    """How many tokens images are to have.

    Attributes:
        thresholds: Thresholds to use, instead of a share.
        keep: Share of the patch tokens.
        per_image: Whether every image keeps this share; otherwise thresholds are calibrated to it on average.
        scales: Number of patch sizes, with ``keep``.
        config: Options of `aptvit.adapt`, from `aptvit.read_config`, instead of all other attributes.
    """

    thresholds: tuple[float, ...] | None = None
    keep: float = 0.5
    per_image: bool = False
    scales: int = 2
    config: Mapping[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        """Options for `aptvit.adapt`, before calibration."""
        if self.config is not None:
            return dict(self.config)
        if self.thresholds is not None:
            return {"thresholds": self.thresholds}
        return {"scales": self.scales, **({"keep": self.keep} if self.per_image else {})}

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are to be calibrated."""
        return self.config is None and self.thresholds is None and not self.per_image

    def __str__(self) -> str:
        if self.config is not None:
            return "as calibrated before"
        if self.thresholds is not None:
            return "thresholds as given"
        share = f"{self.keep:.0%} of the patch tokens"
        return f"{share} of every image" if self.per_image else f"{share} on average (calibrated on these images)"


@dataclass(frozen=True)
class HeldBack:
    """Results on held back images, with thresholds found on the other images.

    Attributes:
        num_images: Number of held back images.
        keep_ratio: Mean share of the patch tokens.
        error: Relative deviation from the target.
        share_quantiles: Quantiles of the share over images, at 0, 5, 25, 50, 75, 95 and 100 %.
    """

    num_images: int
    keep_ratio: float
    error: float
    share_quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Thresholds, with the target and the result.

    Attributes:
        thresholds: From fine to coarse.
        target: The target: ``{"keep": 0.5}``, ``{"gflops": 30.0}`` or ``{"speedup": 1.8}``.
        reached: The value of the same quantity on all images.
        keep_ratio: Mean over images of patch tokens kept / patch tokens of the uniform grid.
        num_images: Number of images, held back images included.
        held_back: Results on held back images; None if there are none.
    """

    thresholds: tuple[float, ...]
    target: dict[str, float]
    reached: dict[str, float]
    keep_ratio: float
    num_images: int
    held_back: HeldBack | None = None

    def to_dict(self) -> dict[str, Any]:
        """All attributes, for JSON."""
        return asdict(self)


def calibrate(
    model: AdaptivePatchTransformer | Patchifier,
    images: Images | Iterable[Images],
    keep: float | None = None,
    *,
    gflops: float | None = None,
    speedup: float | None = None,
) -> tuple[float, ...]:
    """Set a model's thresholds so that these images have a given mean cost.

    One threshold is used for all scales. Busy images keep more tokens than the average, smooth images fewer. Reads the
    images once, in bounded memory. Applies the model's ``blend``, ``min_keep`` and ``max_tokens``, not
    ``max_batch_tokens``.

    Args:
        model: The adaptive model, also one around a ViT, or a `Patchifier`; its thresholds are set.
        images: (B, C, H, W), a list of (C, H_i, W_i), or an iterable of either.
        keep: Mean over the images of patch tokens kept / patch tokens of the uniform grid; 0.5 by default.
        gflops: Instead of ``keep``: mean billions of operations of an image, a multiplication and an addition counted
            as two.
        speedup: Instead of ``keep``: speed relative to the model with nothing merged, measured on the first batch,
            which should have the batch size of the later use.

    Returns:
        The thresholds, from fine to coarse.

    Raises:
        ValueError: If there are no images, or no threshold reaches the target; the message gives the possible range.
    """
    model = getattr(model, "aptvit", model)  # of a model around a ViT
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
    """Collects the cost of images as a function of the threshold, and finds the threshold for a target.

    The cost of an image decreases at each merge, and merges happen one by one as the threshold rises. So the mean cost
    at a threshold is a sum over merges with lower scores. A sorted list of (score, decrease) is kept, thinned to
    ``capacity`` entries; with at most that many merges the result is exact.

    Args:
        model: The adaptive model, or a `Patchifier`.
        target: ``{"keep": 0.5}``, or the name and value of the quantity of ``cost``; ``speedup`` is the inverse cost.
        cost: Cost of one image; by default the share of its patch tokens.
        hold_back: Hold back every n-th image to validate thresholds of the other images; 0 for none. The thresholds
            that are set are those of all images.
        capacity: Most entries to keep.

    Raises:
        ValueError: If the target is out of range.
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
        # With a blend, the target is the budget's share.
        if budget.blend is not None:
            if self._name != "keep":
                raise ValueError(f"a model with blend={budget.blend:g} is calibrated to a share: give keep=")
            budget = budget.deciding(budget.thresholds, self._value)
        else:
            budget = budget.deciding((-1.0,) * (model.num_scales - 1), None)
        self._budget = budget
        self._cost = cost or (lambda tokens, num_patches: (tokens - self._patchifier.num_prefix_tokens) / num_patches)
        self._hold_back = hold_back
        self._training_steps, self._held_back_steps = _Steps(capacity), _Steps(capacity)
        self._held_back_shares = _HeldBackShares()
        self._num_seen = 0
        self._target = (self._name, self._value, model.num_scales)
        self._resolution = 0.0

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
            model: The adaptive model; for ``keep`` also a `Patchifier`.
            target: Name and value.
            images: A batch to measure time with.
            hold_back: As for the class.

        Raises:
            ValueError: If the target is unknown or out of range, or needs a model.
        """
        (name,) = target
        cost: Cost | None = None
        if name == "gflops":
            cost = gflops_of_tokens(_adaptive(model))
        elif name == "speedup":
            batch = images if isinstance(images, Tensor) else torch.stack(list(images))
            cost = time_of_tokens(_adaptive(model), batch)
        elif name != "keep":
            raise ValueError(f"unknown target {name!r}: use keep, gflops or speedup")
        return cls(model, target, cost, hold_back=hold_back)

    def add(self, images: Images) -> None:
        """Score images and add them."""
        self.add_scored(self.model.scores(images))

    def add_scored(self, scored: Sequence[tuple[ImageGroup, Mapping[int, Tensor]]]) -> None:
        """Add images with their scores, from ``model.scores``, so that several targets can share them.

        Raises:
            ValueError: If images are smaller than a patch.
        """
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
                (self._held_back_steps if is_held_back else self._training_steps).add(row, shares, falls)
                if is_held_back:
                    self._held_back_shares.add(row, shares)

    def _curve(self, num_patches: int, available: int) -> tuple[np.ndarray, np.ndarray]:
        """(merges + 1,) share and cost of an image after each of its merges, within the limits."""
        if self._budget.keep is not None:  # a share is rounded to whole merges
            self._resolution = max(self._resolution, 1.51 / num_patches)
        prefix = self._patchifier.num_prefix_tokens
        by_thresholds = torch.arange(available + 1)
        merges = merges_within_limits(self._budget, by_thresholds, num_patches, available, prefix).numpy()
        patches = num_patches - 3 * merges
        return patches / num_patches, self._cost(patches + prefix, num_patches)

    def solve(self) -> Calibration:
        """Find the thresholds and set them.

        Raises:
            ValueError: If there were no images, or no threshold meets the target; the message gives the possible range.
        """
        if self._num_seen == 0:
            raise ValueError("there are no images to calibrate on: give at least one")
        steps = self._training_steps.joined(self._held_back_steps)
        threshold, share, cost = steps.solve(*self._target, self._resolution)
        held_back = None
        if self._held_back_steps.num_images and self._training_steps.num_images:
            threshold_of_others, _, _ = self._training_steps.solve(*self._target, self._resolution)
            mean_share, mean_cost = self._held_back_steps.means_at(threshold_of_others)
            quantiles = np.quantile(self._held_back_shares.at(threshold_of_others), (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
            error = _as_cost(self._name, mean_cost) / self._value - 1
            held_back = HeldBack(self._held_back_steps.num_images, mean_share, error, tuple(map(float, quantiles)))
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
    """Decreases of the summed share and cost of images at each merge, by score."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._parts: list[np.ndarray] = []  # (n, 3): score, fall of the share, fall of the cost
        self._entries = 0
        self._totals = np.zeros(2)
        self.num_images = 0

    def add(self, scores: np.ndarray, shares: np.ndarray, costs: np.ndarray) -> None:
        """Add an image. scores: (merges,), sorted; shares, costs: (merges + 1,) after 0, 1, ... merges."""
        self.num_images += 1
        self._totals += (shares[0], costs[0])
        part = np.stack([scores.astype(np.float64), shares[:-1] - shares[1:], costs[:-1] - costs[1:]], axis=1)
        self._parts.append(part[np.isfinite(scores)])
        self._entries += len(self._parts[-1])
        if self._entries > 2 * self._capacity:
            self._parts = [_thinned(self._sorted(), self._capacity)]
            self._entries = len(self._parts[0])

    def joined(self, other: _Steps) -> _Steps:
        """The steps of two sets of images."""
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

    def solve(self, name: str, value: float, num_scales: int, resolution: float) -> tuple[float, float, float]:
        """The threshold, half-way between two scores, with the nearest mean cost. -> threshold, mean share and cost."""
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
        slack = max(0.005 * most, resolution)
        if not least - slack <= target_cost <= most + slack:
            low, high = sorted((_as_cost(name, least), _as_cost(name, most)))
            raise ValueError(
                f"{name}={value:g} cannot be reached on these images with {num_scales} scales: from {low:.3g} to "
                f"{high:.3g} is possible. Ask for something between, or give more scales"
            )
        best = int(np.abs(costs - target_cost).argmin())
        share, cost = means[best]
        return _threshold_between(scores, best), float(share), float(cost)


def _as_cost(name: str, value: float) -> float:
    """A target's value as a cost, and vice versa: the inverse of a speed-up, other values unchanged."""
    return 1 / value if name == "speedup" else value


def _threshold_between(scores: np.ndarray, count: int) -> float:
    """A threshold with exactly the ``count`` lowest of these sorted scores strictly below."""
    if count == 0:
        return float(scores[0])
    if count == len(scores):
        return float(np.nextafter(np.float32(scores[-1]), np.float32(np.inf)))
    middle = float(np.float32((scores[count - 1] + scores[count]) / 2))  # scores are compared as float32
    return middle if middle > scores[count - 1] else float(scores[count])


def _thinned(steps: np.ndarray, capacity: int) -> np.ndarray:
    """Join neighbouring sorted steps until ``capacity`` are left: decreases add up, at the greatest score."""
    ends = np.linspace(0, len(steps), capacity + 1).astype(int)[1:]
    falls = np.concatenate([np.zeros((1, 2)), steps[:, 1:].cumsum(0)])[np.concatenate([[0], ends])]
    return np.column_stack([steps[ends - 1, 0], np.diff(falls, axis=0)])


class _HeldBackShares:
    """Scores and shares of a random sample of at most ``capacity`` images, to evaluate at a threshold found later."""

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
