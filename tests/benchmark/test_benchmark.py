"""The benchmark: what a record holds, that it goes on where it stopped, and what is written of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import aptvit
from aptvit.benchmark import run as benchmark
from aptvit.benchmark.record import BenchmarkRecord, BenchmarkRow, Case, Memory
from aptvit.benchmark.report import as_markdown, as_table, growth_groups, write_plots
from aptvit.benchmark.run import BenchmarkHost, measure_case, run_benchmark
from aptvit.encoder.buckets import GraphedBlocks
from aptvit.files.batches import read_images
from aptvit.layers.attention import run_block
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.patching.patchifier import Patchifier

TINY = Case("vit_tiny_patch16_224", size=96, batch=2, keep=0.5)
DEPTH, WIDTH, TOKENS = 12, 192, 36


@pytest.fixture
def paths(photos: list[Tensor], tmp_path: Path) -> list[Path]:
    """Three real photos."""
    found = []
    for number, photo in enumerate(photos[:3]):
        found.append(tmp_path / f"{number}.png")
        Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((150, 130)).save(found[-1])
    return found


def only_row(record: BenchmarkRecord) -> BenchmarkRow:
    (row,) = record.rows
    assert row.error is None, row.error
    return row


def forward_flops(base: int, coarse: int) -> int:
    """Of one image with so many patches of each size, by hand."""
    n = base + coarse + 1
    patches = 2 * WIDTH * 3 * (16**2 * base + 32**2 * coarse)
    return patches + DEPTH * (2 * n * 12 * WIDTH**2 + 4 * n**2 * WIDTH) + 2 * WIDTH * 1000


def test_a_row_holds_what_was_asked_and_what_was_found(paths: list[Path]) -> None:
    row = only_row(run_benchmark([TINY], paths, rounds=2))
    assert row.case == TINY and row.image_size == (96, 96)
    assert (row.photos, row.images, len(row.seconds_uniform), len(row.seconds_adaptive)) == (2, 2, 2, 2)
    assert row.keep_mean == pytest.approx(0.5, abs=0.05)
    assert row.keep_least < row.keep_mean < row.keep_most  # calibrated over the photos: they differ
    assert row.layout_ms is not None and row.embed_ms is not None and row.front_share is not None
    assert (row.backend_uniform, row.backend_adaptive) == ("eager", "eager")


def test_inference_at_half_the_tokens_needs_less_memory(paths: list[Path]) -> None:
    row = only_row(run_benchmark([replace(TINY, batch=8)], paths, rounds=1))
    assert row.memory is not None
    # The hidden layer of an MLP, before and after its activation, float32: what a block needs at its peak, at least.
    hidden = 8 * (TOKENS + 1) * 4 * WIDTH * 4
    assert 2 * hidden <= row.memory.step_uniform < 4 * hidden
    assert row.memory.step_adaptive < 0.8 * row.memory.step_uniform
    host = timm.create_model(TINY.model, img_size=96)
    for model, found in ((host, row.memory.resident_uniform), (aptvit.adapt(host), row.memory.resident_adaptive)):
        assert found == 4 * sum(p.numel() for p in model.parameters())


def test_flops_are_those_of_the_patches_counted_by_hand(paths: list[Path]) -> None:
    row = only_row(run_benchmark([TINY], paths, rounds=1))
    data = {**timm.data.resolve_model_data_config(timm.create_model(TINY.model)), "input_size": (3, 96, 96)}
    pixels = torch.stack(read_images(paths, data).pixels[:2])
    patchifier = Patchifier(16, thresholds=row.thresholds)
    counts = patchifier(patchifier.groups(pixels)).counts
    assert row.gflops_uniform * 1e9 == pytest.approx(forward_flops(TOKENS, 0), rel=1e-6)
    expected = sum(forward_flops(*count) for count in counts) / 2
    assert row.gflops_adaptive * 1e9 == pytest.approx(expected, rel=1e-6)


def test_at_keep_1_everything_is_scored_and_nothing_merged(paths: list[Path]) -> None:
    row = only_row(run_benchmark([replace(TINY, keep=1.0)], paths, rounds=1))
    assert row.thresholds == (0.0,)
    assert (row.keep_least, row.keep_most) == (1, 1) and row.flop_ratio == pytest.approx(1)


def test_photos_are_cut_to_full_batches_or_repeated(paths: list[Path]) -> None:
    five, one, first = (replace(TINY, **o) for o in ({"batch": 5}, {"batch": 1}, {"batch": 1, "max_photos": 1}))
    rows = run_benchmark([five, one, first], paths, rounds=1).rows
    assert [(row.images, row.photos) for row in rows] == [(5, 3), (3, 3), (1, 1)]


def test_thresholds_of_one_size_serve_all_sizes(paths: list[Path]) -> None:
    cases = [replace(TINY, size=size, thresholds_from=128, batch=3) for size in (96, 128)]
    small, same = run_benchmark(cases, paths, rounds=1).rows
    assert small.thresholds == same.thresholds
    assert same.keep_mean == pytest.approx(0.5, abs=0.03)
    assert same.keep_mean < small.keep_mean  # bigger pictures are smoother per patch


# In half precision activations are smaller and gradients are not.
@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.8), ("bfloat16", 0.9)])
def test_training_at_half_the_tokens_needs_less_memory(dtype: str, most: float, paths: list[Path]) -> None:
    case = replace(TINY, mode="train", batch=8, keep=0.5, dtype=dtype)
    row = only_row(run_benchmark([case], paths, rounds=2))
    assert row.memory is not None and row.layout_ms is None
    assert row.memory.step_adaptive < most * row.memory.step_uniform
    host = timm.create_model(TINY.model, img_size=96)
    state = 3 * 4  # the weights and AdamW's two moments, float32
    for model, found in ((host, row.memory.resident_uniform), (aptvit.adapt(host), row.memory.resident_adaptive)):
        parameters = list(model.parameters())
        steps = 4 * len(parameters)  # AdamW counts them
        assert found == sum(p.numel() for p in parameters) * state + steps
    assert row.memory.step_ratio < row.memory.total_ratio < 1


def test_what_is_added_is_timed_without_the_blocks(paths: list[Path]) -> None:
    row = only_row(run_benchmark([replace(TINY, keep=1.0)], paths, rounds=1))
    assert row.outside_ms_uniform is not None and row.outside_ms_adaptive is not None
    assert row.outside_ms_unscored is not None and row.added_share(row.outside_ms_unscored) is not None
    assert row.outside_ms_uniform < 1000 * row.case.batch / row.throughput_uniform
    assert row.gflops_uniform == row.gflops_adaptive  # with their blocks
    other = only_row(run_benchmark([TINY], paths, rounds=1))
    assert other.outside_ms_adaptive is None and other.added_share(None) is None


def test_training_counts_forward_and_backward(paths: list[Path]) -> None:
    row = only_row(run_benchmark([replace(TINY, mode="train", keep=1.0)], paths, rounds=1))
    attention = DEPTH * 4 * (TOKENS + 1) ** 2 * WIDTH
    pixels = 2 * WIDTH * 3 * 16**2 * TOKENS
    # Linear maps three times (the pixels need no gradient), attention 2 + 5 products of which forward has 2.
    expected = 3 * (forward_flops(TOKENS, 0) - attention) - pixels + 3.5 * attention
    assert row.gflops_uniform * 1e9 == pytest.approx(expected, rel=1e-6)


def test_compiled_ways_are_tried_and_the_faster_one_is_taken(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []

    def compile(function: Any, **_: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(
        "aptvit.benchmark.run.paired_rounds", lambda sides, *_, **__: [[9.0 - number] for number in range(len(sides))]
    )
    for mode in ("infer", "train"):
        row = only_row(run_benchmark([replace(TINY, compiled=True, mode=mode)], paths, rounds=1))
        # Uniform eager 9, uniform compiled 8, adaptive eager 7, adaptive compiled 6 seconds.
        assert (row.backend_uniform, row.backend_adaptive) == ("compile", "compile")
        assert row.speedup.median == pytest.approx(8 / 6)
    assert compiled.count(run_block) == 2 and len([one for one in compiled if isinstance(one, torch.nn.Module)]) == 2


def test_graphs_are_tried_and_the_faster_way_is_taken(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Callable[[], Any]] = []

    def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recorded.append(run)
        return (lambda: None), run()

    for name, graphs in (("benchmark.run.BlockGraphs", BlockGraphs), ("models.base.GraphedBlocks", GraphedBlocks)):
        monkeypatch.setattr(f"aptvit.{name}", partial(graphs, record=record, device_type="cpu"))

    def rounds(ways: Sequence[Any], batches: Sequence[Any], *_: Any, **__: Any) -> list[list[float]]:
        for way in ways:
            way(batches[0])
        return [[9.0 - way] for way in range(len(ways))]

    monkeypatch.setattr("aptvit.benchmark.run.paired_rounds", rounds)
    case = replace(TINY, graphs=True)
    found = measure_case(BenchmarkRow(case), partial(BenchmarkHost, tuple(paths)), 1)
    assert len(recorded) == 2
    assert (found["backend_uniform"], found["backend_adaptive"]) == ("graphs", "graphs")


# Cases one after the other


def made_up(case: Case, seconds: Sequence[float] = (2.0, 3.0, 4.0), **values: Any) -> BenchmarkRow:
    found: dict[str, Any] = {
        "image_size": (case.size or 384,) * 2,
        "thresholds": (5.5,),
        "photos": 8,
        "images": 8,
        "keep_mean": case.keep,
        "keep_least": 0.8 * case.keep,
        "keep_most": case.keep,
        "gflops_uniform": 100.0,
        "gflops_adaptive": 40.0,
        "seconds_uniform": tuple(seconds),
        "seconds_adaptive": (1.0, 2.0, 1.0),
        "layout_ms": 20.0,
        "embed_ms": 30.0,
    }
    return BenchmarkRow(case, **{**found, **values})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Cases that were measured, with numbers that are made up."""
    seen: list[Case] = []

    def measure(row: BenchmarkRow, **_: Any) -> dict[str, Any]:
        seen.append(row.case)
        return {name: value for name, value in vars(made_up(row.case)).items() if name != "case"}

    monkeypatch.setattr(benchmark, "measure_case", measure)
    return seen


CASES = [replace(TINY, keep=keep) for keep in (1.0, 0.7, 0.5)]


def test_an_interrupted_run_goes_on_where_it_stopped(
    paths: list[Path], tmp_path: Path, measured: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "cpu.json"

    def stop(row: BenchmarkRow) -> None:
        if row.case == CASES[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_benchmark(CASES, paths, output, command="aptvit benchmark", done=stop)
    assert [row.case for row in BenchmarkRecord.load(output).rows] == CASES[:2]
    measured.clear()
    record = run_benchmark(CASES, paths, output, command="aptvit benchmark")
    assert measured == CASES[2:] and [row.case for row in record.rows] == CASES
    assert record.commands == ["aptvit benchmark"]
    other = run_benchmark([replace(TINY, batch=1)], paths, output, command="aptvit benchmark --batch 1")
    assert len(other.rows) == 4 and len(other.commands) == 2  # a record grows from several commands
    measured.clear()
    assert len(run_benchmark(CASES, paths, output, fresh=True).rows) == 3 and measured == CASES


def test_rows_that_failed_are_measured_again(paths: list[Path], tmp_path: Path, measured: list[Case]) -> None:
    output = tmp_path / "cpu.json"
    record = run_benchmark(CASES[:2], paths, output)
    record.put(BenchmarkRow(CASES[0], error="OutOfMemoryError: too big"))
    record.save(output)
    measured.clear()
    assert run_benchmark(CASES[:2], paths, output).failed == [] and measured == CASES[:1]


def test_rows_of_other_photos_or_machines_are_not_mixed(
    paths: list[Path], tmp_path: Path, measured: list[Case]
) -> None:
    output = tmp_path / "cpu.json"
    record = run_benchmark(CASES, paths, output)
    with pytest.raises(ValueError, match=r"another photos .*--fresh"):
        run_benchmark(CASES, paths[:2], output)
    record.environment["torch"] = "1.0"
    record.save(output)
    with pytest.raises(ValueError, match=r"another torch \(1\.0, now"):
        run_benchmark(CASES, paths, output)
    output.write_text('{"rows": 1}')
    with pytest.raises(ValueError, match="does not hold a benchmark"):
        run_benchmark(CASES, paths, output)


def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(paths: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "cpu.json"
    cases = [replace(TINY, keep=0.1), replace(TINY, size=10), TINY]
    rows = run_benchmark(cases, paths, output, rounds=1).rows
    assert "keep=0.1 cannot be reached" in (rows[0].error or "") and rows[1].error and rows[2].error is None
    assert [row.error for row in BenchmarkRecord.load(output).rows] == [row.error for row in rows]


def test_photos_that_cannot_be_read_are_reported(paths: list[Path], tmp_path: Path, measured: list[Case]) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    record = run_benchmark(CASES, [tmp_path / "broken.png", *paths])
    assert len(record.skipped) == 1 and "broken.png" in record.skipped[0]
    assert record.environment["photos"].startswith("3 ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: replace(case, model="vit_nothing"), "timm has no model"),
        (lambda case: replace(case, model="cait_xxs24_224"), "cannot adapt"),
        (lambda case: replace(case, keep=0.0), "keep=0"),
        (lambda case: replace(case, keep=1.1), "keep=1.1"),
        (lambda case: replace(case, batch=0), "batch=0"),
        (lambda case: replace(case, dtype="int8"), "dtype='int8'"),
        (lambda case: replace(case, mode="sleep"), "mode='sleep'"),
        (lambda case: replace(case, mode="train", dtype="float16"), "loss scaler"),
        (lambda case: replace(case, scales=1), "scales=1"),
        (lambda case: replace(case, graphs=True), "CUDA graphs"),
        (lambda case: replace(case, max_photos=0), "max_photos=0"),
        (lambda case: replace(case, device="cuda"), "one device"),
    ],
)
def test_wrong_cases_are_refused_before_anything_runs(
    change: Callable[[Case], Case], message: str, paths: list[Path], measured: list[Case]
) -> None:
    with pytest.raises(ValueError, match=message):
        run_benchmark([TINY, change(TINY)], paths)
    assert not measured


def test_no_cases_no_photos_no_rounds_are_refused(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        run_benchmark([], paths)
    with pytest.raises(ValueError, match="no images"):
        run_benchmark([TINY], [])
    with pytest.raises(ValueError, match="none of 1 files"):
        run_benchmark([TINY], [tmp_path / "nothing.png"])
    with pytest.raises(ValueError, match="rounds=0"):
        run_benchmark([TINY], paths, rounds=0)


# Arithmetic and what is written


def test_numbers_follow_from_the_rounds() -> None:
    row = made_up(TINY)
    assert row.flop_ratio == 2.5
    assert (row.speedup.median, row.speedup.least, row.speedup.most) == (2.0, 1.5, 4.0)
    assert row.eta == pytest.approx(2.0 / 2.5) and row.eta_of_least == pytest.approx(2.0 / 1.0 / 2.5)
    assert (row.throughput_uniform, row.throughput_adaptive) == pytest.approx((8 / 3, 8))
    assert row.front_share == pytest.approx(50 / 250)  # a batch of two takes a quarter of the second
    memory = Memory(step_uniform=100, step_adaptive=40, resident_uniform=100, resident_adaptive=110)
    assert (memory.step_ratio, memory.total_ratio) == pytest.approx((0.4, 0.75))


@pytest.fixture
def record() -> BenchmarkRecord:
    """One of every kind of row."""
    memory = Memory(2_000_000_000, 800_000_000, 1_000_000_000, 1_100_000_000)
    rows = [made_up(case) for case in CASES]
    rows.append(made_up(replace(TINY, mode="train"), layout_ms=None, embed_ms=None, memory=memory))
    rows += [
        made_up(replace(TINY, size=size, keep=0.55, thresholds_from=224), keep_mean=kept, gflops_adaptive=100 * kept)
        for size, kept in ((512, 0.31), (224, 0.55))
    ]
    rows.append(BenchmarkRow(replace(TINY, batch=512), error="OutOfMemoryError: too big"))
    return BenchmarkRecord({"device": "cpu (2 threads)", "torch": "9.9"}, ["aptvit benchmark --out results"], rows)


def test_a_record_survives_json(record: BenchmarkRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "deep" / "record.json")
    assert BenchmarkRecord.load(tmp_path / "deep" / "record.json") == record
    values = record.to_dict()["rows"]
    assert values[1]["eta"] == record.rows[1].eta and values[3]["memory_ratio"]["step"] == 0.4
    assert values[-1] == {"case": asdict(record.rows[-1].case), "error": "OutOfMemoryError: too big"}


def alike(value: Any, expected: Any) -> None:
    """All that was written is there, numbers up to rounding."""
    if isinstance(expected, dict):
        for name in expected:
            alike(value[name], expected[name])
    else:
        assert value == (expected if isinstance(expected, str | None | bool) else pytest.approx(expected))


@pytest.mark.parametrize("name", ["cpu", "cpu-avx2", "cpu-zen4"])
def test_committed_results_are_read_and_written_as_they_are(name: str) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / f"{name}.json"
    record, values = BenchmarkRecord.load(path), json.loads(path.read_text())
    written = json.loads(json.dumps(record.to_dict()))
    assert len(record.measured) == len(values["rows"]) > 0 and written["environment"] == values["environment"]
    for row, before in zip(written["rows"], values["rows"], strict=True):
        alike(row, before)


def test_the_page_answers_each_question_with_its_numbers(record: BenchmarkRecord) -> None:
    page = as_markdown(record)
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(sections) == ["Inference", "Nothing merged", "Training", "Growth with resolution", "Failed"]
    assert "cpu (2 threads)" in page and "aptvit benchmark --out results" in page and "torch: 9.9" in page
    assert "0.54" in sections["Inference"] and "A100" in sections["Inference"]
    inference = [line for line in sections["Inference"].splitlines() if "vit_tiny" in line]
    assert len(inference) == 2 and "| 2.00 (1.50 to 4.00) | 0.80 | 0.80 | 20.00 | 30.00 | 20.0 % |" in inference[0]
    assert "| -50.0 % (-75.0 to -33.3) |" in sections["Nothing merged"]
    assert "| 2,000 / 800 | 0.40 | 0.63 |" in sections["Training"]
    growth = [line for line in sections["Growth with resolution"].splitlines() if "vit_tiny" in line]
    assert ["| 224 |" in growth[0], "| 512 |" in growth[1], "31.0 %" in growth[1], "224 px" in growth[1]] == [True] * 4
    assert "too big" in sections["Failed"] and "batch 512" in sections["Failed"]
    for section in sections.values():
        widths = {line.count("|") for line in section.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_a_record_without_rows_is_a_page_too() -> None:
    assert as_markdown(BenchmarkRecord({"device": "cpu"})).startswith("# Speed on cpu")


def test_the_table_has_a_line_for_each_row_that_was_measured(record: BenchmarkRecord) -> None:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(as_table(record))
    lines = capture.get().splitlines()
    assert sum(line.lstrip().startswith("vit_tiny_patch16_224 at") and "too big" not in line for line in lines) == 6
    assert "too big" in lines[-1]


def test_plots_show_each_line_by_name(record: BenchmarkRecord, tmp_path: Path) -> None:
    eta, growth = write_plots(record, tmp_path, "cpu")
    assert (eta.name, growth.name) == ("cpu-eta.svg", "cpu-growth.svg")
    words = eta.read_text()
    for expected in (
        "vit_tiny_patch16_224 at 96 px, float32, batch 2",
        "training",
        "speed-up",
        "eta",
        "cpu (2 threads)",
    ):
        assert expected in words
    words = growth.read_text()
    for expected in ("keep 0.55 at 224 px", "FLOP ratio", "side of the image, pixels"):
        assert expected in words
    before = growth.read_bytes()
    write_plots(record, tmp_path, "cpu")
    assert growth.read_bytes() == before  # committed files change only with the numbers


def test_growth_is_of_rows_that_differ_in_size_only(record: BenchmarkRecord, tmp_path: Path) -> None:
    ((label, rows),) = growth_groups(record).items()
    assert [row.case.size for row in rows] == [224, 512] and "keep 0.55 at 224 px" in label
    record.rows = record.rows[:4]
    assert growth_groups(record) == {}
    assert [path.name for path in write_plots(record, tmp_path, "one")] == ["one-eta.svg"]
    assert write_plots(BenchmarkRecord({}), tmp_path, "none") == []
