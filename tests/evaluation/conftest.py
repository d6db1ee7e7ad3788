from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

from aptvit.evaluation.methods import UNIFORM, Method
from aptvit.evaluation.record import EvaluationRecord, EvaluationRow, pack_bits
from aptvit.files.sample_photos import sample_photos
from aptvit.hosts.pretrained import Host


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine small photos."""
    path = tmp_path_factory.mktemp("photos")
    for name, photo in sample_photos().items():
        Image.fromarray(photo).reduce(2).save(path / f"{name}.png")
    return path


@pytest.fixture
def load(make_host: Callable[..., Any]) -> Callable[[int | None], Host]:
    """A host of four blocks for 96 pixels, or for another side, with weights that are the same each time."""
    import torch

    def build(size: int | None) -> Host:
        torch.manual_seed(0)
        side = size or 96
        model = make_host(depth=4, img_size=side)
        return Host(model, "here", {**timm.data.resolve_model_data_config(model), "input_size": (3, side, side)})

    return build


@pytest.fixture
def make_row() -> Callable[..., EvaluationRow]:
    """Builds a row of ten photos from its right answers and its time."""

    def make(method: Method, right: str = "1111111100", time: float = 1.0, **changes: Any) -> EvaluationRow:
        answers = pack_bits([letter == "1" for letter in right])
        values: dict[str, Any] = {
            **{"setting": f"set {method.keep}", "photos": len(right), "tokens": method.keep or 1.0},
            **{"gflops": 2 * (method.keep or 1.0), "gflops_uniform": 2.0, "cosine": 0.9},
            **{"seconds": (time, 2.2 * time, 2.8 * time), "seconds_uniform": (1.0, 2.0, 3.0)},
            **{"top1": answers, "top5": answers, "agrees": answers},
        }
        return EvaluationRow(224, method, **{**values, **changes})

    return make


@pytest.fixture
def record(make_row: Callable[..., EvaluationRow]) -> EvaluationRecord:
    """Adaptive patches at three settings, a baseline at two, one that failed."""
    adaptive, baseline = "apt-entropy", "tome"
    rows = [
        make_row(UNIFORM),
        make_row(Method(adaptive, 0.8), "1111111000", 0.95),
        make_row(Method(adaptive, 0.6), "1111110001", 0.7),
        make_row(Method(adaptive, 0.4), "1111000000", 0.5),
        make_row(Method(baseline, 0.8), "1111110000", 0.8),
        make_row(Method(baseline, setting=8), "1110000000", 0.6),
        EvaluationRow(224, Method("evit", 0.6), error="there is no class token"),
    ]
    environment = {"model": "vit_made_up", "device": "cpu (2 threads)", "photos": "10 (sha256 0)", "type": "float32"}
    return EvaluationRecord(environment, ["aptvit evaluate photos"], rows)
