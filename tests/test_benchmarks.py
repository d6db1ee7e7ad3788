"""Scripts in benchmarks/: their tables follow from the committed files, and lines are counted as they should be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_architecture as architecture
from PIL import Image

from aptvit.benchmark.record import BenchmarkRecord
from aptvit.benchmark.report import as_markdown as benchmark_page
from aptvit.evaluation.record import EvaluationRecord
from aptvit.evaluation.report import as_markdown as evaluation_page

FOLDER = Path(__file__).parents[1] / "benchmarks"
RESULTS = FOLDER / "results"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> list[str]:
    """Rows of all tables, without headings and what aligns them."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    aligned = [i for i, line in enumerate(lines) if set(line) <= set("|-: ")]
    return [line for i, line in enumerate(lines) if i not in aligned and i + 1 not in aligned]


def page_of(name: str) -> str:
    """The page that is made of a committed file today."""
    path = RESULTS / f"{name}.json"
    if name.startswith("cpu"):
        return benchmark_page(BenchmarkRecord.load(path))
    if name.startswith("accuracy"):
        return evaluation_page(EvaluationRecord.load(path))
    if name.startswith("scoring"):
        kind = next((kind for kind in ("share", "bands") if kind in name), "cpu")
        return script("scoring").as_markdown(json.loads(path.read_text()), kind)
    if name in ("ablations", "defaults"):
        module = script(name)
        record = module.AblationRecord if name == "ablations" else module.DefaultRecord
        return module.as_markdown(record.load(path), [])
    if name.startswith("commands"):
        module = script("commands")
        return module.as_markdown(module.CommandRecord.load(path))
    if name.startswith(("around", "naflex")):
        module = script(name.split("-")[0])
        record = module.HostRecord if name.startswith("around") else module.NaFlexRecord
        return module.as_markdown(record.load(path))
    if name.startswith("hosts"):
        return script("hosts").as_markdown([json.loads(path.read_text())])
    if name.startswith(("training", "healing", "new-head")):
        module = script("training")
        return module.as_markdown(module.TrainingRecord.load(path))
    kinds = {"dense-speed": "dense_speed", "dense": "dense", "llava": "llava", "video": "video", "bulk": "bulk"}
    kinds |= {"against": "against", "large-images": "large_images", "safety": "safety"}
    kind = next((kinds[start] for start in kinds if name.startswith(start)), name)
    return script(kind).as_markdown(json.loads(path.read_text()))


NAMES = sorted(path.stem for path in RESULTS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_committed_tables_are_made_again_from_their_files(name: str) -> None:
    for library in {"llava": ["transformers"], "bulk": ["pyarrow"], "dense": ["accelerate"]}.get(
        name.split("-")[0], []
    ):
        pytest.importorskip(library)
    expected = rows((RESULTS / f"{name}.md").read_text())
    assert expected and rows(page_of(name)) == expected


def test_lines_of_code_are_counted_without_docstrings_comments_and_blanks() -> None:
    count = script("count_lines").code_lines
    text = '"""Doc\n\nstring."""\n\nx = """two\nlines"""  # no\n\n\ndef f():\n    """Doc."""\n    # no\n    return 1\n'
    assert count(text) == 4
    for path in sorted(architecture.ROOT.rglob("*.py"))[::7]:
        if ": ...\n" not in path.read_text():  # which the other counter takes for a docstring
            assert count(path.read_text()) == architecture.lines_of_code(path)


@pytest.mark.parametrize("reported", [True, False])
def test_a_report_reads_what_nothing_was_chosen_on_and_is_logged(
    reported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    pareto = script("pareto")
    folders = ("imagenet_sample", "imagenet_sample_test", "coco_val64/images", "imagenette/train")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "one.png")
    monkeypatch.setattr(pareto, "PHOTOS", tmp_path / folders[0])
    monkeypatch.setattr(pareto, "REPORTED", tmp_path / folders[1])
    monkeypatch.setattr(pareto, "OTHERS", tuple(tmp_path / folder for folder in folders[2:]))
    monkeypatch.setattr(pareto, "CHECKPOINT", tmp_path / folders[0] / "one.png")
    calls: list[tuple[Path, set[str]]] = []

    def evaluate(photos: Path, *_: object, conditions: Any, **__: object) -> EvaluationRecord:
        calls.append((photos, {path.parent.relative_to(tmp_path).as_posix() for path in conditions.calibration}))
        return EvaluationRecord({})

    monkeypatch.setattr(pareto, "run_evaluation", evaluate)
    monkeypatch.setattr(pareto, "write_results", lambda *_: ())
    arguments = ["--out", str(tmp_path), *(["--report"] if reported else [])]
    monkeypatch.setattr(sys, "argv", ["pareto.py", *arguments])
    pareto.main()
    ((photos, others),) = calls
    assert photos == tmp_path / folders[reported]
    assert others == {
        folder for folder in folders if folder != "imagenet_sample_test" and (reported or folder != folders[0])
    }
    log = tmp_path / "reports.md"
    assert log.exists() == reported
    if reported:
        assert "| imagenet_sample_test | `python benchmarks/pareto.py --out" in log.read_text()
