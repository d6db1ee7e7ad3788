"""Dense trainings on two processes: copied and sharded, with images that differ in the number of crops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import shapes
import timm
import torch
from safetensors.torch import save_file

from aptvit.dense.saved import from_pretrained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scorer", "shard"),
    [*product(("detector", "segmenter"), ["entropy"], ["false", "true"]), ("segmenter", "preview", "false")],
)
def test_two_processes(kind: str, scorer: str, shard: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "weights.safetensors")
    data = (shapes.boxes if kind == "detector" else shapes.masks)(tmp_path / "data", 12, 5)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "aptvit"]
    words += [f"train-{kind}", str(data), "--model", "test_vit", "--checkpoint", str(tmp_path / "weights.safetensors")]
    words += ["--method", "apt", "--keep", "0.6", "--set", f"scorer={scorer}", "--set", "scales=2"]
    words += ["--epochs", "1", "--size", "128", "--batch-size", "4"]
    words += ["--set", "precision=float32", "--set", "workers=0", "--set", "channels=16", "--set", f"shard={shard}"]
    words += ["--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, capture_output=True, env=environment)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["finished"] and results["updates"] == 3
    assert from_pretrained(tmp_path / "run").classes == (("blue", "red") if kind == "detector" else ("0", "1", "2"))
    if (kind, scorer) == ("segmenter", "preview"):
        words += ["--set", "shard=true", "--out", str(tmp_path / "sharded")]
        refused = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert refused.returncode != 0 and "scorer=preview needs whole weights: set shard=false" in refused.stderr
