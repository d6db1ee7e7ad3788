"""Records of long measurements, written row by row: an interrupted run continues where it stopped."""

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
from aptvit.storage.writing import write_json

__all__ = ["Measurement", "Record", "plain"]


@dataclass(frozen=True)
class Measurement:
    """Base class of the rows of a record: the identity of a measurement, and its result or an error.

    Attributes:
        identity: Names of the fields that identify a measurement; a record has at most one row of an identity.
        error: Message of the error; None for a row with a result.
    """

    identity: ClassVar[tuple[str, ...]]
    error: str | None = field(default=None, kw_only=True)

    @property
    def key(self) -> tuple[Any, ...]:
        """Values of the identity."""
        return tuple(getattr(self, name) for name in self.identity)

    def derived(self) -> dict[str, Any]:
        """Numbers computed from the fields, written to JSON for other programs; `from_dict` ignores them."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        if self.error is not None:
            return plain({name: getattr(self, name) for name in (*self.identity, "error")})
        return plain({f.name: getattr(self, f.name) for f in fields(self)} | self.derived())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A row from the result of `to_dict`, also after JSON; keys that are not fields are ignored.

        Raises:
            TypeError: If fields without a default are missing.
        """
        return _restored(cls, values)


Row = TypeVar("Row", bound=Measurement)


@dataclass
class Record(Generic[Row]):
    """Rows measured under the same conditions. A subclass sets the class of the rows.

    Attributes:
        row_type: Class of the rows.
        contents: Description of the record, for error messages.
        environment: The conditions, by label: rows of other conditions are not comparable.
        commands: Command lines that measured the rows.
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
        """Whether the record has a row of the same identity without an error."""
        return any(other.key == row.key for other in self.measured)

    def put(self, row: Row) -> None:
        """Add a row, and remove an earlier row of the same identity."""
        self.rows = [other for other in self.rows if other.key != row.key] + [row]

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        rows = [row.to_dict() for row in self.rows]
        return {"commands": self.commands, "environment": self.environment, "skipped": self.skipped, "rows": rows}

    def save(self, path: Path) -> None:
        """Write the record as JSON. After an interruption, the file is the old or the new record."""
        write_json(path, self.to_dict(), indent=1)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

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
        """Load the record in a file, or make an empty record if there is no file.

        Args:
            path: The file; None for a record that is not written.
            environment: Conditions of new rows.
            command: Command line that measures new rows.
            fresh: Make an empty record in any case.

        Raises:
            ValueError: If the file does not hold such a record, or its rows were measured under other conditions; the
                message names the first that differs.
        """
        record = cls(environment) if path is None or fresh or not path.exists() else cls.load(path)
        for label in {**environment, **record.environment}:
            before, now = record.environment.get(label), environment.get(label)
            if before != now:
                raise ValueError(
                    f"{path} was measured with another {label} ({before}, now {now}): "
                    "--fresh starts anew, another --name keeps it"
                )
        if command is not None and command not in record.commands:
            record.commands.append(command)
        return record

    def measure(
        self,
        rows: Sequence[Row],
        run: Callable[[Row], dict[str, Any]],
        path: Path | None = None,
        *,
        progress: Progress = silent,
        done: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """Measure the rows that the record does not have. An error is recorded in its row, and the next row follows.

        Args:
            rows: Rows with only their identity.
            run: Measures a row, and returns the values of its other fields.
            path: JSON file, written after each row.
            progress: Wraps the rows.
            done: Called with each new row.
        """
        for row in progress(rows, "measuring", len(rows)):
            if self.has(row):
                continue
            try:
                row = replace(row, **run(row))
            except Exception as error:  # errors of too little memory have many classes
                first = (str(error).strip().splitlines() or [""])[0]
                row = replace(row, error=first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}")
            gc.collect()
            torch.cuda.empty_cache()
            self.put(row)
            if path is not None:
                self.save(path)
            done(row)


def plain(value: Any) -> Any:
    """Convert dataclasses, tuples and values of numpy to dicts, lists and numbers for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _restored(kind: Any, value: Any) -> Any:
    """A value from JSON converted to a type: a dataclass, an optional type, a tuple, or the value itself."""
    if hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        return kind(**{f.name: _restored(hints[f.name], value[f.name]) for f in fields(kind) if f.name in value})
    if NoneType in get_args(kind):
        return None if value is None else _restored(get_args(kind)[0], value)
    return tuple(value) if get_origin(kind) is tuple else value
