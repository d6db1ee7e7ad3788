"""Arithmetic of rows, and what a file of them holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aptvit.evaluation.methods import UNIFORM, Method
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow, pack_bits, unpack_bits


@pytest.mark.parametrize("count", [1, 7, 8, 9, 500])
def test_answers_survive_as_text(count: int) -> None:
    answers = np.random.default_rng(count).random(count) < 0.5
    text = pack_bits(answers)
    assert unpack_bits(text, count).tolist() == answers.tolist()
    assert len(text) <= -(-count // 24) * 4  # six answers to a character


def test_numbers_follow_from_the_rounds_and_the_answers(make_row: Callable[..., EvaluationRow]) -> None:
    row = make_row(Method("apt-entropy", 0.5), "1111100000", 0.5)
    assert (row.time.median, row.time.least, row.time.most) == pytest.approx((0.5, 1.4 / 3, 0.55))
    assert row.to_dict()["flop_share"] == 0.5
    share = row.share("top1")
    assert share is not None and share.mean == 0.5 and 0 < share.low < 0.5 < share.high < 1
    assert row.point().time == row.time.median and row.point().scores.tolist() == [1] * 5 + [0] * 5


def test_without_labels_the_uniform_models_answers_count(make_row: Callable[..., EvaluationRow]) -> None:
    row = make_row(Method("tome", 0.5), top1=None, top5=None, agrees=pack_bits([True, False] * 5))
    assert row.share("top1") is None and row.point().scores.tolist() == [1, 0] * 5


def test_at_equal_time_a_row_minus_the_baseline_between_its_settings(record: EvaluationRecord) -> None:
    found = {pair["ours"]: pair for pair in record.at_equal_time(224)}
    assert list(found) == ["apt-entropy at 80 %", "apt-entropy at 60 %", "apt-entropy at 40 %"]
    assert {(pair["size"], pair["rival"]) for pair in found.values()} == {(224, "tome")}
    slow, middle, fast = found.values()
    assert fast["difference"] is None and fast["reason"] == "no setting that fast"
    # Halfway between 30 % at 0.6 and 60 % at 0.8 of the time.
    assert middle["difference"].mean == pytest.approx(0.7 - 0.45) and middle["reason"] == ""
    # Three quarters of the way from 60 % at 0.8 to the uniform model's 80 % at 1.
    assert slow["difference"].mean == pytest.approx(0.7 - 0.75)


def test_the_uniform_model_stands_at_one_whatever_the_noise(make_row: Callable[..., EvaluationRow]) -> None:
    assert make_row(UNIFORM, time=1.07).point().time == 1


def test_a_record_survives_json(record: EvaluationRecord, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    record.save(path)
    assert EvaluationRecord.load(path) == record and not list(path.parent.glob("*.part"))
    values = json.loads(path.read_text())
    assert values["rows"][1]["top1_share"]["mean"] == 0.7 and values["rows"][1]["time"]["median"] == 0.95
    assert values["rows"][-1]["error"] == "there is no class token"
    assert [one["ours"] for one in values["at_equal_time"]] == [f"apt-entropy at {keep} %" for keep in (80, 60, 40)]
    assert values["at_equal_time"][2]["difference"] is None


def test_committed_results_are_read_and_written_as_they_are() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "accuracy-cpu.json"
    record, values = EvaluationRecord.load(path), json.loads(path.read_text())
    written = json.loads(json.dumps(record.to_dict()))
    assert set(written) == set(values) and written["environment"] == values["environment"]
    assert len(record.measured) == len(values["rows"]) == len(written["rows"]) > 0
    for row, before in zip(written["rows"], values["rows"], strict=True):
        assert set(row) == set(before)
        assert EvaluationRow.from_dict(row) == EvaluationRow.from_dict(before)
        assert row["time"] == before["time"] and row["top1"] == before["top1"]
    assert list(map(set, written["at_equal_time"])) == list(map(set, values["at_equal_time"]))


@pytest.mark.parametrize("text", ["{}", '{"rows": [{"size": 224}]}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold an evaluation"):
        EvaluationRecord.load(tmp_path / "no.json")
