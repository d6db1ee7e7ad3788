"""What is searched: the target, and the methods among which the search chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from aptvit.encoder.readings import Reading
from aptvit.evaluation.methods import Method

__all__ = ["LEAST_SHARE", "Candidate", "Goal", "default_candidates"]

_BASELINES = {"downscale": "a smaller image", "tome": "ToMe", "random": "random patches"}

LEAST_SHARE = 0.1
"""Smallest share of the tokens that is tried."""


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        kind: "time" or "gflops", whose value is not to be exceeded; or "agreement", which is to be reached.
        value: Time relative to the uniform model, billions of operations per image, or agreement with the uniform
            model: the share of images with its top-1 class, or the mean cosine of embeddings.

    Raises:
        ValueError: If the value is out of range.
    """

    kind: Literal["time", "agreement", "gflops"]
    value: float

    def __post_init__(self) -> None:
        if not self.value > 0 or (self.kind != "gflops" and self.value > 1):
            allowed = "above 0" if self.kind == "gflops" else "above 0 and at most 1"
            raise ValueError(f"{self.kind}={self.value:g} must be {allowed}")

    @property
    def limits_cost(self) -> bool:
        """Whether the cost is given and the outputs are to be as near as possible; otherwise the reverse."""
        return self.kind != "agreement"

    def __str__(self) -> str:
        if self.kind == "gflops":
            return f"at most {self.value:g} GFLOPs"
        if self.kind == "time":
            return f"at most {100 * self.value:g} % of the time"
        return f"an agreement of at least {100 * self.value:g} %"


@dataclass(frozen=True, order=True)
class Candidate:
    """A method that saves tokens, at any share of them.

    Attributes:
        name: Name of the method, as for `aptvit.evaluation.methods.parse_methods`.
        size: Side in pixels of the images that the method starts from.
        scales: Number of patch sizes of adaptive patches.
        area_bias: As for `aptvit.adapt`.
        reading: As for `aptvit.adapt`.
    """

    name: str
    size: int
    scales: int = 2
    area_bias: float = 0.0
    reading: Reading = "resized"

    @property
    def is_adaptive(self) -> bool:
        """Whether patches are adaptive."""
        return self.name.startswith("apt-")

    def at(self, share: float) -> Method:
        """The method at a share of the tokens of an image of this size."""
        options: Any = {"scales": self.scales, "area_bias": self.area_bias, "reading": self.reading}
        return Method(self.name, round(share, 4), **options)

    def __str__(self) -> str:
        if not self.is_adaptive:
            return _BASELINES.get(self.name, self.name)
        scorer, _, after = self.name.removeprefix("apt-").partition("+")
        words = [f"adaptive patches by {scorer}"]
        words += [f"{self.scales} sizes"] if self.scales > 2 else []
        words += [f"area_bias={self.area_bias:g}"] if self.area_bias else []
        words += [] if self.reading == "resized" else [f"reading={self.reading}"]
        words += ["then ToMe"] if after else []
        return ", ".join(words)


def default_candidates(size: int, patch_size: int) -> list[Candidate]:
    """The candidates that are tried by default, baselines first.

    Args:
        size: Side of the model's input in pixels.
        patch_size: Side of a base patch in pixels.
    """
    baselines = [Candidate(name, size) for name in ("downscale", "tome", "random")]
    adaptive = [Candidate(f"apt-{scorer}", size) for scorer in ("entropy", "embedding", "glance")]
    more_sizes = [Candidate(f"apt-{scorer}", size, scales=3) for scorer in ("entropy", "embedding")]
    with_area = [Candidate("apt-embedding", size, area_bias=0.5)]
    corners = [Candidate(f"apt-{scorer}", size, reading="corner") for scorer in ("embedding", "glance")]
    merged_later = [Candidate(f"apt-{scorer}+tome", size) for scorer in ("embedding", "glance")]
    smaller = round(0.86 * size / (2 * patch_size)) * 2 * patch_size  # three quarters of the tokens
    on_smaller_images = [Candidate("apt-embedding", smaller)] if 0 < smaller < size else []
    return [*baselines, *adaptive, *more_sizes, *with_area, *corners, *merged_later, *on_smaller_images]
