"""Two processes: the gradients of an update are those of one process on the same images."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file

from aptvit.hosts.pretrained import load_host
from aptvit.training import ClassificationRecipe, DistillationRecipe, find_sources, photos
from aptvit.training.data import make_loader
from aptvit.training.sampler import Draw
from aptvit.training.trainer import Training

from .conftest import MODEL, SMALL

# Images of each process, for each update. 0 to 3 are smooth, 4 to 7 noise.
UPDATES = [
    ([0, 4, 1, 5], [2, 6, 3, 7]),
    ([4, 5, 6, 7], [0, 1, 2, 3]),  # the first process has no coarse patch
    ([0, 5, 2, 3, 6], [7, 4]),  # and here more images than the second
]
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"micro_batch_size": 2},
    "fsdp": {"shard": True, "micro_batch_size": 2, "clip": 0.5},
    "fsdp_frozen": {"shard": True, "trains": "new"},
}


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eight")
    torch.manual_seed(1)
    for i in range(8):
        pixels = torch.randint(256, (160, 160, 3)) if i >= 4 else torch.full((160, 160, 3), 30 * i + 40)
        pixels[:40, :40] = torch.randint(256, (40, 40, 3))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / f"{i}.png")
    return root


def gradients(
    rank: int, world: int, images_folder: Path, checkpoint: Path, run: Path, values: Any
) -> list[dict[str, Any]]:
    """Return the whole gradients of each update, then the weights, then the metrics."""
    common = {"batch_size": 8, "pooled_weight": 1.0, "optimizer": "sgd", "lr": 1e-2}
    recipe = DistillationRecipe(
        **{**SMALL, **common, "thresholds": (5.0,), "per_image": False, "init": "nonzero", **values}
    )
    source = photos([images_folder])
    training = Training(recipe, load_host(MODEL, checkpoint), source, source, run)
    training._prepare_shares()
    training._start(None)
    training.learner.train()
    updates: list[dict[str, Any]] = []
    step = training.stepper.step

    def store_gradients() -> None:
        grads = {name: p.grad for name, p in training.model.named_parameters() if p.grad is not None}
        updates.append({name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()})
        step()

    training.stepper.step = store_gradients
    training.log = SimpleNamespace(tick=lambda *_: None, track=lambda steps, *_: steps)
    for parts in UPDATES:
        indices = parts[rank] if world == 2 else [i for part in parts for i in part]
        (batch,) = make_loader(training.task.images, [[Draw(i, 0) for i in indices]], 0)
        values_for_log = training._update(batch, {})
        updates[-1] |= {key: value.reshape(1) for key, value in values_for_log.items() if key != "kept"}
    score = training.validation.score(training.learner, training.network, training.log)
    training.shares.set(recipe.keep)
    weights = training.processes.weights(training.model)
    whole = training.processes.broadcast_value(weights)  # only the first process holds them
    training.processes.load_weights(training.model, whole)
    training.processes.load_optimizer_state(training.optimizer, training.processes.optimizer_state(training.optimizer))
    return [*updates, weights, score]


def whole_runs(shard: bool, folder: Path, checkpoint: Path, run: Path) -> dict[str, Any]:
    """A training that is resumed after its first epoch."""
    values = {**SMALL, "optimizer": "sgd", "lr": 1e-2, "shard": shard, "batch_size": 6, "keep_checkpoints": 1}
    for epochs in (1, 2):
        images, evaluation = find_sources(folder)
        training = Training(
            ClassificationRecipe(**values, epochs=epochs), load_host(MODEL, checkpoint), images, evaluation, run
        )
        results = training.run(resume=True, allow_changes=True)
    return results


def work(rank: int, port: int, images_folder: Path, folder: Path, checkpoint: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results: dict[str, Any] = {}
    for name, values in CASES.items():
        results[name] = gradients(rank, 2, images_folder, checkpoint, out / name, values)
    for shard in (False, True):
        results[f"run_{shard}"] = whole_runs(shard, folder, checkpoint, out / f"run_{shard}")
    torch.save(results, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.slow
def test_two_processes_equal_a_single_process(
    images_folder: Path, folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (port, images_folder, folder, checkpoint, tmp_path), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, values in CASES.items():
        *expected, weights, score = gradients(
            0, 1, images_folder, checkpoint, tmp_path / "one", {**values, "shard": False}
        )
        assert len(expected) == len(UPDATES) and expected[1]["coarse_embed.conv.weight"].abs().max() > 0
        for update, grads in enumerate(expected):
            for rank in (first, second):
                result = rank[name][update]
                assert result.keys() == grads.keys()
                for parameter, grad in grads.items():
                    error = (result[parameter] - grad).abs().max()
                    assert error <= 1e-4 * grad.abs().max() + 1e-9, (name, update, parameter)
        for parameter, value in weights.items():
            torch.testing.assert_close(first[name][-2][parameter], value, atol=1e-6, rtol=1e-4)
        assert first[name][-1] == second[name][-1]
        assert first[name][-1]["agreement"] == score["agreement"]
    single = whole_runs(False, folder, checkpoint, tmp_path / "single")
    expected_weights = load_file(tmp_path / "single" / "model" / "model.safetensors")
    for shard in (False, True):
        results = first[f"run_{shard}"]
        assert results["finished"] and results["updates"] == single["updates"] == 8
        weights = load_file(tmp_path / f"run_{shard}" / "model" / "model.safetensors")
        for name, value in expected_weights.items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-3)
        scores = [{key: run["evaluations"][-1][key] for key in ("update", "top1", "kept")} for run in (results, single)]
        assert scores[0] == pytest.approx(scores[1])
