"""Trainings on a single process: results, interruption and continuation, and recovery from errors."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import aptvit
from aptvit.hosts.pretrained import Host, load_host
from aptvit.storage import writing
from aptvit.training import (
    ClassificationRecipe,
    DistillationRecipe,
    checkpoints,
    find_sources,
    photos,
    processes,
    trainer,
)
from aptvit.training.data import ImageDataset
from aptvit.training.log import read_log
from aptvit.training.trainer import Training

from .conftest import MODEL, SMALL, same


def training(host: Host, folder: Path, run: Path, **values: Any) -> Training:
    kind: Any = DistillationRecipe if values.get("objective") == "distill" else ClassificationRecipe
    recipe = kind(**{**SMALL, **values})
    train, evaluation = find_sources(folder)
    return Training(recipe, host, train, evaluation, run)


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


def test_a_training_learns_and_writes_a_model(host: Host, folder: Path, tmp_path: Path) -> None:
    results = training(host, folder, tmp_path, epochs=8, keep=0.6, eval_every=4).run()
    assert results["finished"] and results["updates"] == 40 and results["speedup"]["median"] > 0
    before, *_, after = results["evaluations"]
    assert after["top1"] == 1.0 and before["update"] == 0 and after["kept"] == pytest.approx(0.6, abs=0.05)
    losses = [line["loss"] for line in read_log(tmp_path) if line["what"] == "train"]
    assert len(losses) == 4 and losses[-1] < 0.15
    model = aptvit.from_pretrained(tmp_path / "model")
    assert model.keep == 0.6 and model.num_classes == 2
    page = (tmp_path / "index.html").read_text()
    assert "<svg" in page and "images/s" in page and "40 updates" in page
    assert any((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"per_image": False, "recalibrate": 2, "drop_path": 0.3, "erasing": 0.5, "crop": 0.4, "flip": 0.5},
        {"ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "auto_augment": "rand-m5", "clip": 1.0},
        {"method": "random", "optimizer": "sgd"},
        {"objective": "distill", "keep_also": (0.7,), "pooled_weight": 1.0, "features_weight": 1.0},
    ],
)
def test_an_interrupted_training_continues_bit_for_bit(
    checkpoint: Path, folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    def fresh(run: str) -> Training:
        return training(load_host(MODEL, checkpoint), folder, tmp_path / run, epochs=2, save_every=1, **options)

    fresh("whole").run()
    for stop_after in (2, 5):
        interrupted = fresh("parts")
        update = interrupted._update

        def update_and_stop(
            *args: Any, training: Any = interrupted, update: Any = update, stop_after: int = stop_after
        ) -> Any:
            values = update(*args)
            if training.update >= stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return values

        interrupted._update = update_and_stop  # type: ignore[method-assign]
        results = interrupted.run(resume=True)
        assert not results["finished"] and results["updates"] == stop_after
    results = fresh("parts").run(resume=True)
    assert results["finished"] and results["updates"] == 10
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    losses = [
        [line["loss"] for line in read_log(tmp_path / run) if line["what"] == "train" and line["update"] == 10]
        for run in ("whole", "parts")
    ]
    assert losses[0] and losses[1]


def test_a_finished_training_is_not_trained_again(host: Host, folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    training(host, folder, tmp_path, max_steps=3).run()
    before = weights(tmp_path)
    results = training(load_host(MODEL, checkpoint), folder, tmp_path, max_steps=3).run(resume=True)
    assert results["updates"] == 3 and same(weights(tmp_path), before)


def test_parts_of_an_update_add_up(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    for run, micro in (("whole", 0), ("parts", 3)):
        options = {"batch_size": 8, "micro_batch_size": micro, "max_steps": 3, "optimizer": "sgd", "lr": 1e-2}
        training(load_host(MODEL, checkpoint), folder, tmp_path / run, **options).run()
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)


def test_checkpointing_and_compiled_blocks_change_nothing(
    folder: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(
        aptvit.models.adaptive_vit.AdaptivePatchTransformer, "compile", lambda self: compiled.append(self)
    )
    for run, options in (("plain", {}), ("other", {"checkpointing": True, "compile": True})):
        training(load_host(MODEL, checkpoint), folder, tmp_path / run, max_steps=2, **options).run()
    for name, value in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "other")[name], value, atol=1e-6, rtol=1e-5)
    assert len(compiled) == 1


@pytest.mark.parametrize(("has_bfloat16", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_the_precision_follows_the_hardware(
    has_bfloat16: bool, precision: str, host: Host, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "computes_in_bfloat16", lambda device: has_bfloat16 and device == "cpu")
    made = training(host, folder, tmp_path, precision="auto")
    assert made.recipe.precision == precision == made.processes.precision


def test_half_precision_trains(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    training(load_host(MODEL, checkpoint), folder, tmp_path / "whole", max_steps=2).run()
    training(load_host(MODEL, checkpoint), folder, tmp_path / "half", max_steps=2, precision="bfloat16").run()
    whole, half = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(value.dtype == torch.float32 for value in half.values()) and not same(whole, half)
    torch.testing.assert_close(half["blocks.0.attn.qkv.weight"], whole["blocks.0.attn.qkv.weight"], atol=3e-3, rtol=0)


def test_frozen_hosts_stay_as_they_are(folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    before = load_host(MODEL, checkpoint).model.state_dict()
    training(load_host(MODEL, checkpoint), folder, tmp_path, trains="new", max_steps=2, keep=0.4).run()
    after = weights(tmp_path)
    changed = {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}
    head = {name for name in after if name.startswith("head.")}  # for other classes, so it is new
    assert changed == head | {name for name in after if name.startswith("coarse_embed.")}


@pytest.mark.parametrize("method", ["uniform", "random", "resize", "downscale", "tome"])
def test_baselines_are_trained(method: str, folder: Path, tmp_path: Path, checkpoint: Path) -> None:
    results = training(load_host(MODEL, checkpoint), folder, tmp_path, method=method, max_steps=2, keep=0.6).run()
    last = results["evaluations"][-1]
    assert last["kept"] == pytest.approx(1.0 if method == "uniform" else 0.6, abs=0.08)
    assert (results["speedup"] is None) == (method == "uniform")
    load_host(MODEL, tmp_path / "model" / "model.safetensors" if method != "resize" else checkpoint)


def test_thresholds_are_calibrated_on_augmented_images_and_again(host: Host, folder: Path, tmp_path: Path) -> None:
    calibrated = training(host, folder, tmp_path, per_image=False, keep=0.6, crop=0.3, recalibrate=2, epochs=1)
    calls = []
    calibrate = calibrated.shares.calibrate
    calibrated.shares.calibrate = lambda images: calls.append(calibrate(images))  # type: ignore[method-assign]
    results = calibrated.run()
    plain = 3  # without augmentation: at the start, at the end, and for the saved model
    assert len(calls) == 1 + 5 // 2 + plain
    assert results["finished"]
    model = aptvit.from_pretrained(tmp_path / "model")
    images, _ = find_sources(folder)
    dataset = ImageDataset(images, host.data)
    batch = torch.stack([dataset[i][0] for i in range(20)])
    assert model.layout(batch).keep_ratio == pytest.approx(0.6, abs=0.01)


def test_distillation_reduces_the_divergence(host: Host, folder: Path, tmp_path: Path) -> None:
    recipe = DistillationRecipe(**{**SMALL, "keep": 0.4, "epochs": 12, "pooled_weight": 1.0, "init": "nonzero"})
    source = photos([folder / "train"])
    results = Training(recipe, host, source, source, tmp_path).run()
    before, after = results["evaluations"]
    assert after["divergence"] < before["divergence"] / 2 and "top1" not in after
    with pytest.raises(ValueError, match="needs trained weights"):
        Training(recipe, Host(host.model, "random", host.data), source, None, tmp_path)


def test_the_teacher_reads_each_validation_image_once(host: Host, folder: Path, tmp_path: Path) -> None:
    source = photos([folder / "train"])
    values = {
        **SMALL,
        "keep": 0.6,
        "keep_also": (0.8,),
        "epochs": 1,
        "interpolate": 1.0,
        "max_steps": 1,
        "micro_batch_size": 4,
    }
    training: Any = Training(DistillationRecipe(**values), host, source, source, tmp_path)
    read: list[int] = []
    training.task.teacher.register_forward_hook(lambda _, inputs, __: read.append(len(inputs[0])))
    results = training.run()
    assert len(results["evaluations"]) == 4  # two shares, before and after; and five weights were tried at both
    assert sum(read) == len(source) + training.recipe.batch_size


@pytest.mark.slow
def test_the_best_interpolated_weights_are_kept(host: Host, folder: Path, tmp_path: Path) -> None:
    source = photos([folder / "train"])
    values = {**SMALL, "keep": 0.8, "epochs": 1, "interpolate": 1.0}
    all_tried = {}
    for run, lr, ema in (("gently", 1e-4, 0.0), ("averaged", 1e-4, 0.9), ("harmful", 0.03, 0.0)):
        distillation = Training(
            DistillationRecipe(**{**values, "lr": lr, "ema": ema}), copy.deepcopy(host), source, source, tmp_path / run
        )
        results = distillation.run()
        (interpolation,) = (line for line in read_log(tmp_path / run) if line["what"] == "interpolation")
        tried = {
            float(name.removeprefix("divergence_")): value
            for name, value in interpolation.items()
            if "divergence" in name
        }
        assert len(tried) == 5 and interpolation["way"] == min(tried, key=tried.__getitem__)
        before, after = results["evaluations"]
        assert after["divergence"] == pytest.approx(tried[interpolation["way"]], rel=1e-3, abs=1e-9)
        assert after["divergence"] <= before["divergence"] + 1e-7
        saved = weights(tmp_path / run)
        assert all(torch.equal(saved[name], weight) for name, weight in distillation.network.state_dict().items())
        all_tried[run] = tried
    # The moving average of the same updates has other weights at the end.
    assert all_tried["averaged"][0.0] == all_tried["gently"][0.0]
    assert all_tried["averaged"][1.0] != all_tried["gently"][1.0]
    assert interpolation["way"] == 0.0  # of the harmful training
    with pytest.raises(ValueError, match="interpolate needs whole weights"):
        DistillationRecipe(interpolate=1.0, shard=True)


def test_a_time_limit_ends_the_training(
    host: Host, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = training(host, folder, tmp_path, epochs=1000, max_minutes=1.0)
    update, rates = limited._update, []

    def ten_seconds(*args: Any) -> Any:
        values = update(*args)
        limited.seconds += 10
        rates.append(limited.optimizer.param_groups[0]["lr"])
        return values

    monkeypatch.setattr(limited, "_update", ten_seconds)
    results = limited.run()
    assert results["updates"] == 6 and rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 4


def test_an_image_that_cannot_be_read_is_reported(host: Host, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "cat" / "03.png").write_bytes(b"no image")
    (tmp_path / "data" / "val" / "cat" / "11.png").write_bytes(b"no image")
    results = training(host, tmp_path / "data", tmp_path / "run", epochs=1).run()
    assert results["finished"]
    problems = [line["message"] for line in read_log(tmp_path / "run") if line["what"] == "problem"]
    assert len(problems) == 1 and "03.png" in problems[0]
    assert "03.png" in (tmp_path / "run" / "index.html").read_text()


def test_a_full_disk_costs_checkpoints_only(
    host: Host, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "write_checkpoint", full)
    results = training(host, folder, tmp_path, epochs=1, save_every=2).run()
    assert results["finished"] and (tmp_path / "model" / "model.safetensors").is_file()
    assert sum("No space left" in line.get("message", "") for line in read_log(tmp_path)) == 3


def test_the_model_is_written_on_a_disk_with_room_for_a_checkpoint(
    folder: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One checkpoint fits, two do not: the optimizer's state makes room for the model, which replaces it."""

    def free(_: Path) -> int:
        return capacity - sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())

    def fresh(run: str) -> Training:
        return training(load_host(MODEL, checkpoint), folder, tmp_path / run, max_steps=2, save_every=1, ema=0.9)

    capacity = 10**12
    for module in (writing, checkpoints):
        monkeypatch.setattr(module, "free_bytes", free)
    fresh("whole").run()
    (size,) = {
        sum(file.stat().st_size for file in path.iterdir()) for path in (tmp_path / "whole" / "checkpoints").iterdir()
    }
    expected = weights(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    capacity = int(1.1 * size)
    assert fresh("full").run()["finished"]
    told = capsys.readouterr().err
    assert "no checkpoint after 2 updates: cannot write" in told and "the disk is full (it needs" in told
    assert "state.pt were deleted to write the model" in told
    assert same(weights(tmp_path / "full"), expected) and not list((tmp_path / "full" / "checkpoints").iterdir())
    capacity -= free(tmp_path) - 50_000
    with pytest.raises(OSError, match=r"the disk is full \(it needs .* the same command with --resume writes it then"):
        fresh("none").run()


def test_a_loss_that_is_not_finite_is_an_error(host: Host, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite after \d+ updates, and are not saved: lower lr"):
        training(host, folder, tmp_path, lr=1e30, optimizer="sgd", epochs=4, save_every=1).run()
    for file in tmp_path.glob("checkpoints/*/*.safetensors"):  # of updates before
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_combinations_that_do_not_fit_are_errors(host: Host, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method=random has no feature maps"):
        training(host, folder, tmp_path, objective="distill", method="random", features_weight=1.0)


@pytest.mark.parametrize(
    ("cpus", "local_processes", "device", "workers"),
    [(16, 1, "cpu", 4), (16, 2, "cpu", 2), (2, 1, "cpu", 0), (64, 1, "cuda", 16), (16, 4, "cuda", 4)],
)
def test_workers_follow_the_machine(
    cpus: int, local_processes: int, device: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cpus)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
    this = processes.Processes.__new__(processes.Processes)
    this.device = torch.device(device)
    assert this.workers(-1) == workers and this.workers(3) == 3
