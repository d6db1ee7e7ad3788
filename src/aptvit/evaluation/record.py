"""What an evaluation asked and what it found, photo by photo, as values and as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from aptvit.evaluation.bootstrap import Interval, bootstrap_mean
from aptvit.evaluation.methods import UNIFORM, Method
from aptvit.evaluation.pairing import NotComparable, Point, difference_at_equal_time
from aptvit.measuring.records import write_json
from aptvit.measuring.timing import Spread

__all__ = ["Comparison", "Record", "Row", "pack_bits", "unpack_bits"]


def pack_bits(answers: Sequence[bool] | np.ndarray) -> str:
    """Yes or no for each photo as text, six to a character."""
    return base64.b64encode(np.packbits(np.asarray(answers, dtype=bool)).tobytes()).decode()


def unpack_bits(text: str, count: int) -> np.ndarray:
    """(count,) bool, what `pack_bits` was given."""
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


@dataclass(frozen=True)
class Row:
    """What was found for one method at one size; numbers are missing where ``error`` says why.

    Attributes:
        size: Side of the uniform model's input in pixels.
        method: What was asked.
        error: Why it could not run.
        setting: What was set, in words.
        photos: Photos that were run.
        tokens: Tokens that enter a block, relative to the uniform model's: mean over blocks and photos.
        gflops: Billions of operations per image; a multiply and an add count as two. Of the timed photos.
        gflops_uniform: The same for the uniform model.
        seconds: Of each round over the timed photos.
        seconds_uniform: Of the uniform model in the same rounds.
        cosine: Mean cosine of the logits with the uniform model's.
        top1: Whether the answer was right, photo by photo, packed; None without labels.
        top5: Whether the label was among the first five, likewise.
        agrees: Whether the answer was the uniform model's, likewise.
    """

    size: int
    method: Method
    error: str | None = None
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
    def time(self) -> Spread:
        """Time relative to the uniform model, over the rounds."""
        return Spread.of_ratios(self.seconds, self.seconds_uniform)

    @property
    def flop_share(self) -> float:
        """Operations relative to the uniform model."""
        return self.gflops / self.gflops_uniform

    def answers(self, kind: str) -> np.ndarray | None:
        """(photos,) bool: "top1", "top5" or "agrees"; None without labels."""
        text = getattr(self, kind)
        return None if text is None else unpack_bits(text, self.photos)

    def share(self, kind: str) -> Interval | None:
        """Share of the photos with its 95 % interval; of "top1", "top5" or "agrees"."""
        answers = self.answers(kind)
        return None if answers is None else bootstrap_mean(answers)

    def point(self) -> Point:
        """Where it stands: right answers against time; without labels, the uniform model's answers."""
        answers = self.answers("top1")
        if answers is None:
            answers = self.answers("agrees")
        assert answers is not None
        return Point(1.0 if self.method == UNIFORM else self.time.median, answers.astype(np.float64))

    def to_dict(self) -> dict[str, Any]:
        """All numbers, those that follow from others too, as plain values for JSON."""
        if self.error is not None:
            return {"size": self.size, "method": asdict(self.method), "error": self.error}
        derived = {"time": asdict(self.time), "flop_share": self.flop_share}
        for kind in ("top1", "top5", "agrees"):
            share = self.share(kind)
            derived[f"{kind}_share"] = None if share is None else asdict(share)
        return {**asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` gave, read from JSON; what follows from other numbers is computed again."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        for name in ("seconds", "seconds_uniform"):
            if name in known:
                known[name] = tuple(known[name])
        return cls(**{**known, "method": Method(**known["method"])})


@dataclass(frozen=True)
class Comparison:
    """One row of ours against one rival at equal measured time.

    Attributes:
        row: Ours.
        rival: Name of the rival.
        difference: Ours minus the rival's, of top-1, or of agreement where there are no labels.
        reason: Why there is no difference.
    """

    row: Row
    rival: str
    difference: Interval | None
    reason: str = ""


@dataclass
class Record:
    """Rows measured on one machine with one model, one set of versions and of photos.

    Attributes:
        environment: All that must be the same for rows to stand side by side, by label.
        commands: Command lines that made the rows.
        rows: What was found.
        skipped: What was left out of the photos, and why.
    """

    environment: dict[str, str]
    commands: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def find(self, size: int, method: Method) -> Row | None:
        """The row of a method at a size, if it was measured."""
        mine = [row for row in self.measured if (row.size, row.method) == (size, method)]
        return mine[0] if mine else None

    def put(self, row: Row) -> None:
        """Add a row, in the place of an earlier one of the same method and size."""
        self.rows = [other for other in self.rows if (other.size, other.method) != (row.size, row.method)] + [row]

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.error is None]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.error is not None]

    @property
    def sizes(self) -> list[int]:
        """Sizes that have measured rows, from small to large."""
        return sorted({row.size for row in self.measured})

    @property
    def has_labels(self) -> bool:
        return all(row.top1 is not None for row in self.measured)

    def curves(self, size: int) -> dict[str, list[Row]]:
        """Rows of each method at a size, from many tokens to few: the uniform model, ours, then rivals."""
        rows = [row for row in self.measured if row.size == size]
        rows.sort(key=lambda row: (row.method != UNIFORM, not row.method.is_ours))  # stable: as they were asked for
        curves: dict[str, list[Row]] = {}
        for row in rows:
            curves.setdefault(row.method.name, []).append(row)
        return {name: sorted(ones, key=lambda row: -row.tokens) for name, ones in curves.items()}

    def comparisons(self, size: int) -> list[Comparison]:
        """Each row of ours against each rival of that size at equal measured time."""
        curves = self.curves(size)
        uniform = [row.point() for row in curves.get(UNIFORM.name, [])]
        rivals = {
            name: [row.point() for row in rows] + uniform
            for name, rows in curves.items()
            if not rows[0].method.is_ours and name != UNIFORM.name
        }
        ours = [row for rows in curves.values() for row in rows if row.method.is_ours]
        return [_compare(row, name, curve) for row in ours for name, curve in rivals.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "commands": self.commands,
            "environment": self.environment,
            "skipped": self.skipped,
            "rows": [row.to_dict() for row in self.rows],
            "at_equal_time": [
                {
                    "size": size,
                    "ours": str(one.row.method),
                    "rival": one.rival,
                    "difference": None if one.difference is None else asdict(one.difference),
                    "reason": one.reason,
                }
                for size in self.sizes
                for one in self.comparisons(size)
            ],
        }

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file does not hold a record.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row.from_dict(row) for row in values["rows"]]
            return cls(values["environment"], values["commands"], rows, values["skipped"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold an evaluation ({type(error).__name__}: {error})") from None


def _compare(row: Row, rival: str, curve: Sequence[Point]) -> Comparison:
    try:
        return Comparison(row, rival, difference_at_equal_time(row.point(), curve))
    except NotComparable as error:
        return Comparison(row, rival, None, str(error))
