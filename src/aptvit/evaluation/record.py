"""The rows and the record of an evaluation, with results of each image."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from aptvit.evaluation.methods import UNIFORM, Method
from aptvit.evaluation.statistics import Interval, NotComparable, Point, bootstrap_mean, difference_at_equal_time
from aptvit.measuring.record import Measurement, Record, plain
from aptvit.measuring.rounds import Ratio

__all__ = ["AtEqualTime", "EvaluationRecord", "EvaluationRow", "pack_bits", "unpack_bits"]


def pack_bits(answers: Sequence[bool] | np.ndarray) -> str:
    """Pack a truth value for each image into text, six to a character."""
    return base64.b64encode(np.packbits(np.asarray(answers, dtype=bool)).tobytes()).decode()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """The (count,) bool values of a text from `pack_bits`."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


@dataclass(frozen=True)
class EvaluationRow(Measurement):
    """The result of a method at a size.

    Attributes:
        size: Side of the uniform model's input in pixels.
        method: The method.
        setting: Setting of the method, in words.
        photos: Number of images.
        tokens: Tokens that enter a block over those of the uniform model: mean over blocks and images.
        gflops: Billions of operations per timed image; a multiplication and an addition are two.
        gflops_uniform: The same for the uniform model.
        seconds: Seconds of each round over the timed images.
        seconds_uniform: The same for the uniform model in the same rounds.
        cosine: Mean cosine between the logits and the uniform model's.
        top1: For each image whether the top-1 class is correct, from `pack_bits`; None without labels.
        top5: For each image whether the label is among the top-5 classes, likewise.
        agrees: For each image whether the top-1 class is the uniform model's, likewise.
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

    def bits(self, kind: str) -> np.ndarray | None:
        """(photos,) bool of "top1", "top5" or "agrees"; None without labels."""
        text = getattr(self, kind)
        return None if text is None else unpack_bits(text, self.photos)

    def share(self, kind: str) -> Interval | None:
        """Share of the images with "top1", "top5" or "agrees", with its interval; None without labels."""
        bits = self.bits(kind)
        return None if bits is None else bootstrap_mean(bits)

    def point(self) -> Point:
        """Accuracy and time; without labels, agreement and time. The uniform model's relative time is 1."""
        bits: Any = self.bits("agrees" if self.top1 is None else "top1")
        return Point(1.0 if self.method == UNIFORM else self.time.median, bits.astype(np.float64))

    def derived(self) -> dict[str, Any]:
        shares = {f"{kind}_share": self.share(kind) for kind in ("top1", "top5", "agrees")}
        return {"time": self.time, "flop_share": self.flop_share, **shares}


@dataclass(frozen=True)
class AtEqualTime:
    """An adaptive row and a baseline at equal measured time.

    Attributes:
        row: The adaptive row.
        baseline: Name of the baseline.
        difference: Top-1 accuracy of the row minus the baseline's; without labels, of the agreement.
        reason: Reason for a missing difference.
    """

    row: EvaluationRow
    baseline: str
    difference: Interval | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        pair = {"size": self.row.size, "ours": str(self.row.method), "rival": self.baseline}
        return plain({**pair, "difference": self.difference, "reason": self.reason})


@dataclass
class EvaluationRecord(Record[EvaluationRow]):
    """Rows measured on one machine with one model, one set of versions and of images."""

    row_type = EvaluationRow
    contents = "an evaluation"

    @property
    def sizes(self) -> list[int]:
        """Sizes of the measured rows in pixels, from small to large."""
        return sorted({row.size for row in self.measured})

    @property
    def has_labels(self) -> bool:
        """Whether all images have labels."""
        return all(row.top1 is not None for row in self.measured)

    def curves(self, size: int) -> dict[str, list[EvaluationRow]]:
        """Rows of each method at a size, from many tokens to few: the uniform model, adaptive methods, baselines."""
        rows = [row for row in self.measured if row.size == size]
        curves: dict[str, list[EvaluationRow]] = {}
        for row in sorted(rows, key=lambda row: (row.method != UNIFORM, not row.method.is_adaptive)):
            curves.setdefault(row.method.name, []).append(row)
        return {name: sorted(curve, key=lambda row: -row.tokens) for name, curve in curves.items()}

    def at_equal_time(self, size: int) -> list[AtEqualTime]:
        """Each adaptive row and each baseline at a size."""
        curves = self.curves(size)
        uniform = [row.point() for row in curves.pop(UNIFORM.name, [])]
        adaptive = [row for rows in curves.values() for row in rows if row.method.is_adaptive]
        points = {name: [row.point() for row in rows] + uniform for name, rows in curves.items()}
        baselines = [name for name, rows in curves.items() if not rows[0].method.is_adaptive]
        return [_at_equal_time(row, name, points[name]) for row in adaptive for name in baselines]

    def to_dict(self) -> dict[str, Any]:
        pairs = [pair.to_dict() for size in self.sizes for pair in self.at_equal_time(size)]
        return super().to_dict() | {"at_equal_time": pairs}


def _at_equal_time(row: EvaluationRow, name: str, baseline: Sequence[Point]) -> AtEqualTime:
    try:
        return AtEqualTime(row, name, difference_at_equal_time(row.point(), baseline), "")
    except NotComparable as error:
        return AtEqualTime(row, name, None, str(error))
