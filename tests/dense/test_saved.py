"""Detectors and segmenters on disk are read back as they were, or refused, also where only their weights are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aptvit.dense import make_segmenter
from aptvit.dense.saved import from_pretrained, save, start_from

INFERENCE = {"slide": False, "crop": 128, "longer_side": 0}


@pytest.fixture
def folder(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    model = make_model()
    options = {"num_classes": 2, "channels": 16}
    network = make_segmenter(model, **options)
    save(tmp_path, model, "segmentation", ("sky", "road"), options, network.state_dict(), INFERENCE)
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    read = from_pretrained(folder)
    assert read.classes == ("sky", "road") and read.inference == INFERENCE and read.task == "segmentation"
    network = make_segmenter(from_pretrained(folder).model, num_classes=2, channels=16)
    start_from(network, folder)
    for name, value in network.state_dict().items():
        assert torch.equal(value, read.network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("classes", [], "0 names for 2 classes"),
        ("classes", 5, "config.json"),
        ("inference", None, "config.json"),
        ("inference", {"slide": 1, "crop": 128, "longer_side": 0}, "slide"),
        ("task", "exec", "config.json"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, name: str, value: Any, message: str) -> None:
    network = from_pretrained(folder).network
    config = json.loads((folder / "config.json").read_text())
    config["dense"][name] = value
    (folder / "config.json").write_text(json.dumps(config))
    for read in (lambda: from_pretrained(folder), lambda: start_from(network, folder)):
        with pytest.raises(ValueError, match=message):
            read()
