"""The rows and the record of an evaluation, with results of each image."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from aptvit.evaluation.methods import UNIFORM, Method
from aptvit.evaluation.statistics import Interval, Point, bootstrap_mean, difference_at_equal_time
from aptvit.measuring.record import Measurement, Record, plain
from aptvit.measuring.rounds import Ratio

__all__ = ["EvaluationRecord", "EvaluationRow", "pack_bits", "unpack_bits"]


def pack_bits(bits: Any) -> str:
    """Pack a truth value for each image, a sequence, an array or a tensor, into text, six to a character."""
    return base64.b64encode(np.packbits(np.asarray(bits, dtype=bool)).tobytes()).decode()


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
        divergences: For each image the Kullback-Leibler divergence of the classes from the uniform model's, in nats.
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
    divergences: tuple[float, ...] = ()

    @property
    def time(self) -> Ratio:
        """Time relative to the uniform model, over the rounds."""
        return Ratio.of_rounds(self.seconds, self.seconds_uniform)

    def bits(self, kind: str) -> np.ndarray | None:
        """(photos,) bool of "top1", "top5" or "agrees"; None without labels."""
        text = getattr(self, kind)
        return None if text is None else unpack_bits(text, self.photos)

    def share(self, kind: str) -> Interval | None:
        """Share of the images with "top1", "top5" or "agrees", with its interval; None without labels."""
        bits = self.bits(kind)
        return None if bits is None else bootstrap_mean(bits)

    @property
    def divergence(self) -> Interval | None:
        """Mean divergence, with its interval over images; None in records of earlier versions."""
        return bootstrap_mean(np.array(self.divergences)) if self.divergences else None

    def point(self) -> Point:
        """Accuracy and time; without labels, agreement and time. The uniform model's relative time is 1."""
        bits: Any = self.bits("agrees" if self.top1 is None else "top1")
        return Point(1.0 if self.method == UNIFORM else self.time.median, bits.astype(np.float64))

    def derived(self) -> dict[str, Any]:
        shares = {f"{kind}_share": self.share(kind) for kind in ("top1", "top5", "agrees")}
        return {"time": self.time, "flop_share": self.gflops / self.gflops_uniform, **shares}


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

    def at_equal_time(self, size: int) -> list[dict[str, Any]]:
        """Each adaptive row and each baseline of a size at equal measured time.

        Returns:
            For each pair: ``size``; ``ours``, the method of the adaptive row, and ``rival``, the name of the baseline;
            ``difference``, the `Interval` of the accuracy of the row minus the baseline's, or of the agreement without
            labels; None with a ``reason`` where the baseline does not reach the time.
        """
        curves = self.curves(size)
        points = {name: [row.point() for row in rows + curves.get(UNIFORM.name, [])] for name, rows in curves.items()}
        adaptive = [row for rows in curves.values() for row in rows if row.method.is_adaptive]
        baselines = [name for name in curves if name not in {UNIFORM.name, *(row.method.name for row in adaptive)}]
        pairs = []
        for row, name in product(adaptive, baselines):
            difference, reason = difference_at_equal_time(row.point(), points[name])
            pair = {"size": size, "ours": str(row.method), "rival": name}
            pairs.append({**pair, "difference": difference, "reason": reason})
        return pairs

    def to_dict(self) -> dict[str, Any]:
        pairs = [pair for size in self.sizes for pair in self.at_equal_time(size)]
        return super().to_dict() | {"at_equal_time": plain(pairs)}
