"""The whole run on a small model: every method, resumed where it stopped, whatever is wrong said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from aptvit.evaluation import run as module
from aptvit.evaluation.methods import BASELINES, UNIFORM, Conditions, Method, parse_methods
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow
from aptvit.evaluation.report import write_results
from aptvit.evaluation.run import run_evaluation
from aptvit.hosts.pretrained import Host

Load = Callable[[int | None], Host]
QUICK = Conditions(batch_size=4, timed_images=4, rounds=2, fit_steps=2)
METHODS = parse_methods(["apt-entropy", "tome"], [0.8, 0.6])


def labels(folder: Path, host: Host, wrong: int = 0) -> Path:
    """The model's own answers by timm's own transform, the first ``wrong`` of them changed."""
    transform = timm.data.create_transform(**host.data, is_training=False)
    lines = ["file,class_index"]
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        with torch.inference_mode():
            answer = int(host.model(transform(Image.open(path).convert("RGB"))[None]).argmax())
        lines.append(f"{path.name},{(answer + (i < wrong)) % 10}")
    table = folder / "labels-here.csv"
    table.write_text("\n".join(lines))
    return table


def test_every_method_runs(folder: Path, load: Load, tmp_path: Path) -> None:
    methods = parse_methods([*BASELINES, "apt-entropy", "apt-upsample-global"], [0.7])
    table = labels(folder, load(None), wrong=2)
    record = run_evaluation(table, load, "tiny", methods, conditions=QUICK, command="aptvit evaluate")
    assert not record.failed, record.failed
    assert [row.method for row in record.rows] == methods
    uniform = record.rows[0]
    answers = uniform.bits("top1")
    assert answers is not None and answers.tolist() == [False, False] + [True] * 7
    for row in record.rows:
        assert row.photos == 9 and row.size == 96
        assert row.tokens == pytest.approx(0.7 if row.method.keep else 1, abs=0.1)
        assert row.gflops_uniform == uniform.gflops and (row.gflops < uniform.gflops) == (row is not uniform)
        assert len(row.seconds) == len(row.seconds_uniform) == 2 and min(row.seconds) > 0
        agreement, right = row.bits("agrees"), row.bits("top1")
        assert agreement is not None and right is not None
        assert (right[2:] == agreement[2:]).all() and not (right & agreement)[:2].any()
        assert -1 <= row.cosine <= 1.000001
    assert uniform.cosine == pytest.approx(1) and uniform.bits("agrees").all()  # type: ignore[union-attr]
    written = write_results(record, tmp_path, "map")
    page = written[1].read_text()
    assert all(f"| {method.name} |" in page for method in methods)


def test_with_everything_kept_all_answers_are_the_uniform_models(folder: Path, load: Load) -> None:
    record = run_evaluation(folder, load, "tiny", parse_methods(["apt-entropy", "tome"], [1.0]), conditions=QUICK)
    for row in record.measured:
        assert row.top1 is None and row.bits("agrees").all()  # type: ignore[union-attr]
        assert row.cosine == pytest.approx(1, abs=1e-5) and row.tokens == 1
        assert row.gflops == pytest.approx(row.gflops_uniform, rel=1e-3)
    assert len(record.measured) == 3 and not record.has_labels


def test_sizes_and_calibration_photos(folder: Path, load: Load) -> None:
    methods = parse_methods(["apt-entropy-global", "downscale"], [0.6])
    others = tuple(sorted(folder.glob("c*.png")))
    conditions = dataclasses.replace(QUICK, calibration=others, max_images=5)
    record = run_evaluation(folder, load, "tiny", methods, sizes=[96, 128], conditions=conditions)
    assert [(row.size, row.method.name) for row in record.rows] == [
        (size, method.name) for size in (96, 128) for method in methods
    ]
    assert {row.photos for row in record.rows} == {5} and not record.failed
    assert "other photos" in record.rows[1].setting and record.environment["calibrated on"].startswith("4 others")
    assert [row.setting for row in record.rows if row.method.name == "downscale"] == ["80 px", "96 px"]


def test_uniform_and_method_take_turns_batch_by_batch(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    sides: dict[Any, int] = {}

    def seconds(run: Any, _device: str) -> float:
        ((uniform, small),) = run.args
        turns.append(sides.setdefault(run.func, len(sides)))
        assert uniform.shape[-1] == 96 and small.shape[-1] in (96, 64)
        return (1.0, 0.25)[turns[-1] % 2]

    monkeypatch.setattr("aptvit.measuring.rounds._seconds", seconds)
    conditions = dataclasses.replace(QUICK, timed_images=9, rounds=2)
    record = run_evaluation(folder, load, "tiny", [Method("downscale", setting=64)], conditions=conditions)
    # Two full batches of four out of nine photos, two rounds: who goes first changes with each batch and round.
    assert len(turns) == 16 and turns[8:] == [2, 3, 3, 2, 3, 2, 2, 3]
    assert record.rows[1].seconds_uniform == (2.0, 2.0) and record.rows[1].seconds == (0.5, 0.5)
    assert record.rows[1].time.median == 0.25


# Going on


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, make_row: Callable[..., EvaluationRow]) -> list[tuple[int, Method]]:
    """Replaces measuring; says what was asked for."""
    seen: list[tuple[int, Method]] = []

    def measure(inputs: Any, row: EvaluationRow) -> dict[str, Any]:
        assert row.size == inputs.size
        seen.append((row.size, row.method))
        values = vars(make_row(row.method))
        return {name: value for name, value in values.items() if name not in ("size", "method")}

    monkeypatch.setattr(module, "_measure", measure)
    return seen


def test_an_interrupted_run_goes_on_where_it_stopped(
    folder: Path, load: Load, tmp_path: Path, measured: list[tuple[int, Method]]
) -> None:
    output = tmp_path / "deep" / "map.json"

    def stop(row: EvaluationRow) -> None:
        if row.method == METHODS[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_evaluation(folder, load, "tiny", METHODS, output, conditions=QUICK, command="one", done=stop)
    assert [row.method for row in EvaluationRecord.load(output).rows] == METHODS[:3]
    measured.clear()
    record = run_evaluation(folder, load, "tiny", METHODS, output, conditions=QUICK, command="one")
    assert [method for _, method in measured] == METHODS[3:] and [row.method for row in record.rows] == METHODS
    measured.clear()
    more = run_evaluation(folder, load, "tiny", METHODS, output, sizes=[96, 128], conditions=QUICK, command="two")
    assert measured == [(128, method) for method in METHODS]  # None was 96
    assert more.commands == ["one", "two"] and len(more.rows) == 10
    measured.clear()
    again = run_evaluation(folder, load, "tiny", METHODS[:2], output, conditions=QUICK, fresh=True)
    assert len(measured) == len(again.rows) == 2


def test_rows_that_failed_are_tried_again(
    folder: Path, load: Load, tmp_path: Path, measured: list[tuple[int, Method]]
) -> None:
    output = tmp_path / "map.json"
    record = run_evaluation(folder, load, "tiny", METHODS, output, conditions=QUICK)
    record.put(EvaluationRow(96, METHODS[1], error="OutOfMemoryError: too big"))
    record.save(output)
    measured.clear()
    assert not run_evaluation(folder, load, "tiny", METHODS, output, conditions=QUICK).failed
    assert measured == [(96, METHODS[1])]


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"name": "other"}, "model"),
        ({"conditions": dataclasses.replace(QUICK, max_images=3)}, "photos"),
        ({"conditions": dataclasses.replace(QUICK, batch_size=2)}, "batch"),
        ({"conditions": dataclasses.replace(QUICK, dtype=torch.bfloat16)}, "type"),
    ],
)
def test_rows_of_something_else_are_not_mixed(
    folder: Path,
    load: Load,
    tmp_path: Path,
    measured: list[tuple[int, Method]],
    change: dict[str, Any],
    label: str,
) -> None:
    output = tmp_path / "map.json"
    run_evaluation(folder, load, "tiny", METHODS, output, conditions=QUICK)
    options = {"name": "tiny", "conditions": QUICK, **change}
    with pytest.raises(ValueError, match=rf"with another {label} .*--fresh"):
        run_evaluation(folder, load, options.pop("name"), METHODS, output, **options)


def test_rows_of_other_weights_are_not_mixed(
    folder: Path, load: Load, tmp_path: Path, measured: list[tuple[int, Method]]
) -> None:
    """A saved model has the same name after it was saved anew."""

    def load_other(size: int | None) -> Host:
        host: Any = load(size)
        host.model.norm.bias.data += 1
        return dataclasses.replace(host, weights="trained")

    options = {"conditions": QUICK, "output": tmp_path / "map.json"}
    run_evaluation(folder, lambda size: dataclasses.replace(load(size), weights="trained"), "tiny", METHODS, **options)
    with pytest.raises(ValueError, match=r"with another weights \(trained \(\w+\), now trained \(\w+\)\): --fresh"):
        run_evaluation(folder, load_other, "tiny", METHODS, **options)


# What is wrong


def test_a_method_that_cannot_run_is_a_row_that_says_why(folder: Path, load: Load, tmp_path: Path) -> None:
    methods = [Method("evit", 0.1), Method("downscale", setting=100), Method("apt-entropy", 0.1), Method("tome", 0.8)]
    rows = run_evaluation(folder, load, "tiny", methods, tmp_path / "map.json", conditions=QUICK).rows
    assert [row.error is None for row in rows] == [True, False, False, False, True]
    assert "cannot go down" in (rows[1].error or "") and "least share" in (rows[3].error or "")
    assert EvaluationRecord.load(tmp_path / "map.json").rows == rows


def test_a_file_that_cannot_be_read_does_not_stop_the_rest(folder: Path, load: Load, tmp_path: Path) -> None:
    for path in sorted(folder.glob("c*.png")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chaos.png").write_text("no picture")
    names = [path.name for path in sorted(tmp_path.glob("*.png"))]
    rows = [f"{name},{i}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class_index", *rows, "gone.png,0"]))
    record = run_evaluation(tmp_path, load, "tiny", METHODS[:2], conditions=QUICK)
    assert {row.photos for row in record.measured} == {len(names) - 1} and not record.failed
    assert len(record.skipped) == 2 and "gone.png" in record.skipped[0] and "chaos.png" in record.skipped[1]


def test_what_cannot_be_evaluated_is_refused(folder: Path, load: Load, tmp_path: Path) -> None:
    host = load(None)
    hosts = {
        "random weights": dataclasses.replace(host, weights="random"),
        "only square": dataclasses.replace(host, data={**host.data, "input_size": (3, 96, 64)}),
    }
    for message, one in hosts.items():
        with pytest.raises(ValueError, match=message):
            run_evaluation(folder, lambda _, one=one: one, "tiny", METHODS, conditions=QUICK)  # type: ignore[misc]
    host.model.reset_classifier(0)  # type: ignore[operator]
    with pytest.raises(ValueError, match="has no classes"):
        run_evaluation(folder, lambda _: host, "tiny", METHODS, conditions=QUICK)
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        run_evaluation(tmp_path, load, "tiny", METHODS, conditions=QUICK)
    with pytest.raises(ValueError, match="no sizes"):
        run_evaluation(folder, load, "tiny", METHODS, sizes=[], conditions=QUICK)


@pytest.mark.parametrize("name", ["batch_size", "timed_images", "rounds", "fit_steps"])
def test_conditions_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        Conditions(**{name: 0})
    with pytest.raises(ValueError, match="scales=1"):
        Conditions(scales=1)


def test_answers_that_are_no_numbers_are_no_answers(folder: Path, load: Load) -> None:
    def broken(size: int | None) -> Host:
        host = load(size)
        with torch.no_grad():
            host.model.head.bias[0] = np.nan  # type: ignore[index, union-attr]
        return host

    record = run_evaluation(folder, broken, "tiny", METHODS[:2], conditions=QUICK)
    assert all("not finite" in (row.error or "") for row in record.rows)
    assert record.rows[0].method == UNIFORM
