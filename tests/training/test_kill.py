"""A training that was killed at random times continues and ends with the weights of an uninterrupted training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import MODEL, same

# Forks a child for each attempt, so that libraries are loaded once; the child is killed after a random time.
_KILLER = """
import json, os, random, signal, sys, time
import accelerate, tensorboard.compat, torch, torch.utils.tensorboard, torchmetrics  # once, not in each child
torch.set_num_threads(1)
from aptvit.hosts.pretrained import load_host
from aptvit.training import ClassificationRecipe, find_sources
from aptvit.training.trainer import Training

folder, checkpoint, out, kills = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
from pathlib import Path

def train(run):
    values = dict(precision="float32", workers=0, batch_size=4, per_image=True, eval_every=0, lr=1e-3, keep=0.6)
    recipe = ClassificationRecipe(**values, epochs=4, save_every=1, drop_path=0.2, ema=0.9, crop=0.5, erasing=0.3)
    images, evaluation = find_sources(folder)
    training = Training(recipe, load_host("MODEL", Path(checkpoint)), images, evaluation, run)
    training._measure_speedup = lambda: None
    training.run(resume=True)

def start(run):
    child = os.fork()
    if child == 0:
        train(run)
        os._exit(0)
    return child

_, status = os.waitpid(start(Path(out) / "whole"), 0)
assert status == 0, status
rng, run = random.Random(7), Path(out) / "killed"
killed = attempts = 0
while True:
    child = start(run)
    attempts += 1
    if killed < kills:
        # Killed at a random time after a new checkpoint: during the next updates, or while a checkpoint is written.
        newest = max((path.name for path in run.glob("checkpoints/[0-9]*")), default="")
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if max((path.name for path in run.glob("checkpoints/[0-9]*")), default="") != newest:
                time.sleep(rng.uniform(0, 0.12))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed += 1
                break
            time.sleep(0.002)
        else:
            break
    else:
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        break
print(json.dumps({"killed": killed, "attempts": attempts}))
""".replace("MODEL", MODEL)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_points(number: int, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLER, folder, checkpoint, tmp_path, number]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"killed": number, "attempts": number + 1}
    whole, killed = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "killed"))
    assert same(whole, killed)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))  # incomplete checkpoints are removed
