"""Records: what a file holds, that a run continues where it stopped, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from aptvit.measuring.record import Measurement, Record, plain
from aptvit.measuring.rounds import Ratio
from aptvit.storage.writing import write_json

HERE = {"machine": "a desk", "torch": "9.9"}


@dataclass(frozen=True)
class Case:
    name: str
    size: int | None = None


@dataclass(frozen=True)
class MadeUpRow(Measurement):
    identity: ClassVar[tuple[str, ...]] = ("case", "seed")

    case: Case
    seed: int
    seconds: tuple[float, ...] = ()
    ratio: Ratio | None = None
    scores: dict[str, float] | None = None

    def derived(self) -> dict[str, Any]:
        return {"total": sum(self.seconds)}


class MadeUpRecord(Record[MadeUpRow]):
    row_type = MadeUpRow
    contents = "made-up rows"


WANTED = [MadeUpRow(Case("a"), seed) for seed in range(3)]


def measure(row: MadeUpRow) -> dict[str, Any]:
    return {"seconds": (1.0, row.seed), "ratio": Ratio(2.0, 1.0, 3.0)}


def run(path: Path | None, wanted: Sequence[MadeUpRow] = WANTED, **options: Any) -> tuple[MadeUpRecord, list[int]]:
    """A record, and the seeds that were measured now."""
    seen: list[int] = []
    result, done = options.pop("measure", measure), options.pop("done", lambda row: None)

    def seeing(row: MadeUpRow) -> dict[str, Any]:
        seen.append(row.seed)
        return result(row)

    record = MadeUpRecord.resume(path, options.pop("environment", HERE), **options)
    record.measure(wanted, seeing, path, done=done)
    return record, seen


def test_a_record_survives_json(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    record, _ = run(None)
    record.put(MadeUpRow(Case("b", 7), 1, scores={"top1": 0.5}))
    record.put(MadeUpRow(Case("c"), 0, error="too big"))
    record.skipped.append("x.png: broken")
    record.save(path)
    assert MadeUpRecord.load(path) == record and [file.name for file in path.parent.iterdir()] == ["record.json"]
    rows = json.loads(path.read_text())["rows"]
    assert rows[1]["total"] == 2.0 and rows[1]["ratio"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert rows[-1] == {"case": {"name": "c", "size": None}, "seed": 0, "error": "too big"}


def test_keys_of_other_versions_are_ignored_and_missing_ones_have_their_defaults(tmp_path: Path) -> None:
    rows = [{"case": {"name": "a", "colour": "red"}, "seed": 1, "was_derived": 3}]
    write_json(tmp_path / "old.json", {"environment": HERE, "commands": [], "rows": rows})
    assert MadeUpRecord.load(tmp_path / "old.json").rows == [MadeUpRow(Case("a"), 1)]


def test_an_interrupted_run_continues_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def stop(row: MadeUpRow) -> None:
        if row.seed == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, command="first", done=stop)
    assert [row.seed for row in MadeUpRecord.load(path).rows] == [0, 1]
    record, seen = run(path, command="first")
    assert seen == [2] and [row.seed for row in record.rows] == [0, 1, 2] and record.commands == ["first"]
    record, seen = run(path, [MadeUpRow(Case("b"), 0)], command="second")
    assert seen == [0] and len(record.rows) == 4 and record.commands == ["first", "second"]
    record, seen = run(path, fresh=True)
    assert seen == [0, 1, 2] and len(record.rows) == 3 and record.commands == []


def test_an_interruption_while_a_row_is_measured_is_no_error_of_the_row(tmp_path: Path) -> None:
    def interrupt(row: MadeUpRow) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "record.json", measure=interrupt)
    assert not (tmp_path / "record.json").exists()


def test_a_row_that_fails_says_why_and_the_next_one_follows(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def fail(row: MadeUpRow) -> dict[str, Any]:
        if row.seed == 0:
            raise ValueError("too\nsmall")
        if row.seed == 1:
            raise MemoryError("too big")
        return measure(row)

    def failing(row: MadeUpRow) -> None:
        assert MadeUpRecord.load(path).rows[-1] == row  # written before it is shown

    record = MadeUpRecord.resume(path, HERE)
    record.measure(WANTED, fail, path, done=failing)
    assert [row.error for row in record.rows] == ["too", "MemoryError: too big", None]
    assert [row.seed for row in record.failed] == [0, 1] and [row.seed for row in record.measured] == [2]
    again, seen = run(path)
    assert seen == [0, 1] and not again.failed  # rows that failed are measured again
    assert [row.seed for row in again.rows] == [2, 0, 1]


def test_a_row_takes_the_place_of_the_one_before() -> None:
    record, _ = run(None)
    assert record.has(WANTED[1]) and not record.has(MadeUpRow(Case("a", 5), 1))
    record.put(MadeUpRow(Case("a"), 1, error="no"))
    assert len(record.rows) == 3 and not record.has(WANTED[1])


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({**HERE, "machine": "a rack"}, r"another machine \(a desk, now a rack\): --fresh .*--name"),
        ({**HERE, "cuda": "13"}, r"another cuda \(None, now 13\)"),
        ({"machine": "a desk"}, r"another torch \(9\.9, now None\)"),
    ],
)
def test_rows_of_another_machine_are_not_mixed(there: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    run(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(path, environment=there)
    assert path.read_bytes() == before
    assert run(path, environment=there, fresh=True)[1] == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "3", '{"rows": 3}', '{"rows": [{"seed": 1}], "environment": {}, "commands": []}', '{"rows": ['],
)
def test_a_file_that_holds_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(ValueError, match=r"no\.json does not hold made-up rows"):
        MadeUpRecord.load(tmp_path / "no.json")
    with pytest.raises(ValueError, match=r"gone\.json does not hold made-up rows"):
        MadeUpRecord.load(tmp_path / "gone.json")


def test_plain_values_are_json() -> None:
    values = {"a": np.float32(0.5), 2: (np.arange(2), Case("x")), "c": [None, True]}
    assert plain(values) == {"a": 0.5, "2": [[0, 1], {"name": "x", "size": None}], "c": [None, True]}
    json.dumps(plain(values))
