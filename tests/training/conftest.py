"""A small host, and small images cut from those that scikit-image installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import class_folders
import pytest
import torch

from aptvit.hosts.pretrained import Host, load_host

MODEL = "test_vit"  # timm's smallest ViT: 160 pixels, patches of 16
SMALL = {"precision": "float32", "workers": 0, "batch_size": 4, "per_image": True, "eval_every": 0, "lr": 1e-3}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders.cats_and_cups(tmp_path_factory.mktemp("images"))


@pytest.fixture
def host(checkpoint: Path) -> Host:
    return load_host(MODEL, checkpoint)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
