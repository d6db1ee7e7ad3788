"""What an evaluation measures, and its results image by image, as values and as JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from aptvit.evaluation.methods import UNIFORM, Method
from aptvit.evaluation.statistics import Interval, NotComparable, Point, bootstrap_mean, difference_at_equal_time
from aptvit.measuring.record import Measurement, Record, plain
from aptvit.measuring.rounds import Ratio

__all__ = ["AtEqualTime", "EvaluationRecord", "EvaluationRow", "pack_bits", "unpack_bits"]


def pack_bits(answers: Sequence[bool] | np.ndarray) -> str:
    """Yes or no for each image as text, six to a character."""
    return base64.b64encode(np.packbits(np.asarray(answers, dtype=bool)).tobytes()).decode()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """(count,) bool, what `pack_bits` was given."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


@dataclass(frozen=True)
class EvaluationRow(Measurement):
    """The result of one method at one size.

    Attributes:
        size: Side of the uniform model's input in pixels.
        method: What ran.
        setting: Its setting, in words.
        photos: Number of images that were run.
        tokens: Tokens that enter a block, relative to the uniform model's: mean over blocks and images.
        gflops: Billions of operations per image; a multiply and an add count as two. Of the timed images.
        gflops_uniform: The same for the uniform model.
        seconds: Of each round over the timed images.
        seconds_uniform: Of the uniform model in the same rounds.
        cosine: Mean cosine of the logits with the uniform model's.
        top1: Whether the answer was right, image by image, packed; None without labels.
        top5: Whether the label was among the first five, likewise.
        agrees: Whether the answer was the uniform model's, likewise.
    """

    identity: ClassVar[tuple[str, ...]] = ("size", "method")

    size: int
    method: Method
    setting: str = ""
    photos: int = 0
    tokens: float = 0.0
    gflops: float = 0.0
    gflops_uniform: float = 0.0
    seconds: tuple[float, ...] = ()
    seconds_uniform: tuple[float, ...] = ()
    cosine: float = 0.0
    top1: str | None = None
    top5: str | None = None
    agrees: str = ""

    @property
    def time(self) -> Ratio:
        """Time relative to the uniform model, over the rounds."""
        return Ratio.of_rounds(self.seconds, self.seconds_uniform)

    @property
    def flop_share(self) -> float:
        """Operations relative to the uniform model."""
        return self.gflops / self.gflops_uniform

    def answers(self, kind: str) -> np.ndarray | None:
        """(photos,) bool: "top1", "top5" or "agrees"; None without labels."""
        text = getattr(self, kind)
        return None if text is None else unpack_bits(text, self.photos)

    def share(self, kind: str) -> Interval | None:
        """Share of the images with its 95 % interval; of "top1", "top5" or "agrees"."""
        answers = self.answers(kind)
        return None if answers is None else bootstrap_mean(answers)

    def point(self) -> Point:
        """Right answers against time; without labels, answers of the uniform model."""
        answers = self.answers("agrees" if self.top1 is None else "top1")
        assert answers is not None
        return Point(1.0 if self.method == UNIFORM else self.time.median, answers.astype(np.float64))

    def derived(self) -> dict[str, Any]:
        shares = {f"{kind}_share": self.share(kind) for kind in ("top1", "top5", "agrees")}
        return {"time": self.time, "flop_share": self.flop_share, **shares}


@dataclass(frozen=True)
class AtEqualTime:
    """An adaptive row against one baseline at equal measured time.

    Attributes:
        size: Side of the uniform model's input in pixels.
        ours: Method of the adaptive row, in words.
        rival: Name of the baseline.
        difference: The row's minus the baseline's, of top-1, or of agreement where there are no labels.
        reason: Why there is no difference.
    """

    size: int
    ours: str
    rival: str
    difference: Interval | None = None
    reason: str = ""


@dataclass
class EvaluationRecord(Record[EvaluationRow]):
    """Rows measured on one machine with one model, one set of versions and of images."""

    row_type = EvaluationRow
    contents = "an evaluation"

    @property
    def sizes(self) -> list[int]:
        """Sizes that have measured rows, from small to large."""
        return sorted({row.size for row in self.measured})

    @property
    def has_labels(self) -> bool:
        return all(row.top1 is not None for row in self.measured)

    def curves(self, size: int) -> dict[str, list[EvaluationRow]]:
        """Rows of each method at a size, from many tokens to few: the uniform model, adaptive ones, then baselines."""
        rows = [row for row in self.measured if row.size == size]
        rows.sort(
            key=lambda row: (row.method != UNIFORM, not row.method.is_adaptive)
        )  # stable: in the order of the call
        curves: dict[str, list[EvaluationRow]] = {}
        for row in rows:
            curves.setdefault(row.method.name, []).append(row)
        return {name: sorted(curve, key=lambda row: -row.tokens) for name, curve in curves.items()}

    def at_equal_time(self, size: int) -> list[AtEqualTime]:
        """Each adaptive row against each baseline of that size at equal measured time."""
        curves = self.curves(size)
        uniform = curves.pop(UNIFORM.name, [])
        baselines = {name: [*rows, *uniform] for name, rows in curves.items() if not rows[0].method.is_adaptive}
        adaptive = [row for rows in curves.values() for row in rows if row.method.is_adaptive]
        return [_at_equal_time(row, name, rows) for row in adaptive for name, rows in baselines.items()]

    def to_dict(self) -> dict[str, Any]:
        pairs = [pair for size in self.sizes for pair in self.at_equal_time(size)]
        return super().to_dict() | {"at_equal_time": plain(pairs)}


def _at_equal_time(row: EvaluationRow, name: str, baseline: Sequence[EvaluationRow]) -> AtEqualTime:
    pair = AtEqualTime(row.size, str(row.method), name)
    try:
        return replace(pair, difference=difference_at_equal_time(row.point(), [other.point() for other in baseline]))
    except NotComparable as error:
        return replace(pair, reason=str(error))
