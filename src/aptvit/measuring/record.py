"""Records of long measurements: written row by row, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch

from aptvit.measuring.progress import Progress, silent

__all__ = ["Measurement", "Record", "plain", "write_json"]


@dataclass(frozen=True)
class Measurement:
    """Base of the rows of a record: what was measured, and the result or an error.

    Attributes:
        identity: Names of the fields that say what was measured; a record has one row for each of their values.
        error: Why there is no result.
    """

    identity: ClassVar[tuple[str, ...]]
    error: str | None = field(default=None, kw_only=True)

    @property
    def key(self) -> tuple[Any, ...]:
        """Values of the identity."""
        return tuple(getattr(self, name) for name in self.identity)

    def derived(self) -> dict[str, Any]:
        """Numbers that follow from the fields: written for other programs, not read again."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        if self.error is not None:
            return plain({name: getattr(self, name) for name in (*self.identity, "error")})
        return plain({f.name: getattr(self, f.name) for f in fields(self)} | self.derived())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A row from what `to_dict` returned, or from JSON of it; keys that are no fields are ignored.

        Raises:
            TypeError, KeyError: If fields are missing.
        """
        return _restored(cls, values)


Row = TypeVar("Row", bound=Measurement)


@dataclass
class Record(Generic[Row]):
    """Rows measured under the same conditions. A subclass says which rows.

    Attributes:
        row_type: Class of the rows.
        contents: What a file holds, for messages.
        environment: All that must be the same for rows to stand side by side, by label.
        commands: Command lines that made the rows.
        rows: The results.
        skipped: Messages for files that could not be read.
    """

    row_type: ClassVar[type[Measurement]]
    contents: ClassVar[str] = "a record"

    environment: dict[str, str]
    commands: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def measured(self) -> list[Row]:
        """Rows without an error."""
        return [row for row in self.rows if row.error is None]

    @property
    def failed(self) -> list[Row]:
        """Rows with an error."""
        return [row for row in self.rows if row.error is not None]

    def has(self, row: Row) -> bool:
        """Whether this was measured without an error."""
        return any(other.key == row.key for other in self.measured)

    def put(self, row: Row) -> None:
        """Add a row, in the place of an earlier one of the same identity."""
        self.rows = [other for other in self.rows if other.key != row.key] + [row]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "commands": self.commands,
            "environment": self.environment,
            "skipped": self.skipped,
            "rows": [row.to_dict() for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file does not hold such a record.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows: list[Any] = [cls.row_type.from_dict(row) for row in values["rows"]]
            return cls(values["environment"], values["commands"], rows, values.get("skipped", []))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold {cls.contents} ({type(error).__name__}: {error})") from None

    @classmethod
    def resume(
        cls, path: Path | None, environment: dict[str, str], command: str | None = None, fresh: bool = False
    ) -> Self:
        """The record of a file, or an empty one where there is none yet.

        Args:
            path: The file; None for a record that is not written.
            environment: Conditions of the rows to come.
            command: Command line that makes them.
            fresh: Start with an empty record, whatever the file holds.

        Raises:
            ValueError: If the file holds something else, or rows that were measured under other conditions; the message
                names the first that differs.
        """
        record = cls(environment) if path is None or fresh or not path.exists() else cls.load(path)
        before = record.environment
        for label in {**environment, **before}:
            if before.get(label) != environment.get(label):
                raise ValueError(
                    f"{path} was measured with another {label} ({before.get(label)}, now {environment.get(label)}): "
                    "--fresh starts anew, another --name keeps it"
                )
        if command is not None and command not in record.commands:
            record.commands.append(command)
        return record

    def measure(
        self,
        wanted: Sequence[Row],
        run: Callable[[Row], dict[str, Any]],
        path: Path | None = None,
        *,
        progress: Progress = silent,
        done: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """Measure what is not in the record yet. A failure becomes a row with an error, and the next one follows.

        Args:
            wanted: Rows with their identity alone.
            run: Measures one of them, and returns the values of the other fields.
            path: JSON file, written after each row.
            progress: Wraps the rows.
            done: Called with each new row.
        """
        for row in progress(wanted, "measuring", len(wanted)):
            if self.has(row):
                continue
            try:
                row = replace(row, **run(row))
            except Exception as error:  # out of memory has many names
                first = (str(error).strip().splitlines() or [""])[0]
                row = replace(row, error=first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}")
            gc.collect()
            torch.cuda.empty_cache()
            self.put(row)
            if path is not None:
                self.save(path)
            done(row)


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON; an interruption leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numpy's values as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _restored(kind: Any, value: Any) -> Any:
    """A value of a type from JSON."""
    if hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        return kind(**{f.name: _restored(hints[f.name], value[f.name]) for f in fields(kind) if f.name in value})
    if NoneType in get_args(kind):
        return (
            None if value is None else _restored(next(part for part in get_args(kind) if part is not NoneType), value)
        )
    return tuple(value) if get_origin(kind) is tuple else value
