"""The number of images that run at a time: from the memory of small steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aptvit.hosts.pretrained import load_host
from aptvit.measuring.memory import peak_memory
from aptvit.training import ClassificationRecipe, find_sources, micro_batches
from aptvit.training.log import read_log
from aptvit.training.micro_batches import choose_micro_batch, images_that_fit
from aptvit.training.trainer import Training

from .conftest import MODEL, SMALL, same


@pytest.mark.parametrize(("budget", "images"), [(1000, 20), (199, 16), (169, 16), (80, 8), (79, 4), (5, 1), (-5, 1)])
def test_all_images_or_a_power_of_two_fits(budget: float, images: int) -> None:
    assert images_that_fit(budget, 10, 20) == images


def make(folder: Path, run: Path, checkpoint: Path, **values: Any) -> Training:
    recipe = ClassificationRecipe(**{**SMALL, "batch_size": 16, "epochs": 2, "new_lr": 1.0, **values})
    return Training(recipe, load_host(MODEL, checkpoint), *find_sources(folder), run)


def test_a_step_of_the_chosen_number_stays_within_the_budget(
    folder: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make(folder, tmp_path, checkpoint, keep=0.5)
    training.shares.set(0.5)
    accelerator = training.processes.accelerator
    monkeypatch.setattr(micro_batches, "_CPU_BUDGET", 20e6)
    state = torch.get_rng_state()
    number, note = choose_micro_batch(training.task, 16, accelerator)
    assert 1 < number < 16 and f"{number} of the 16 images" in note
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in training.network.parameters())
    images = torch.randn(number, 3, 160, 160)

    def step() -> None:
        training.network(images).square().mean().backward()

    step()
    assert 4e6 < peak_memory(step, "cpu") < 20e6
    monkeypatch.setattr(micro_batches, "_CPU_BUDGET", 10e9)
    assert choose_micro_batch(training.task, 16, accelerator) == (16, "")


def test_the_chosen_number_is_told_kept_in_checkpoints_and_changes_rounding_only(
    folder: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"optimizer": "sgd", "lr": 1e-2, "keep": 0.6, "save_every": 1}
    whole = make(folder, tmp_path / "whole", checkpoint, micro_batch_size=16, **options)
    whole.run()
    monkeypatch.setattr(micro_batches, "_CPU_BUDGET", 20e6)
    parts = make(folder, tmp_path / "parts", checkpoint, **options)
    parts.run()
    chosen = parts.micro_batch_size
    assert 1 < chosen < 16
    assert any(f"{chosen} of the 16" in line.get("message", "") for line in read_log(tmp_path / "parts"))
    for name, tensor in whole.network.state_dict().items():
        torch.testing.assert_close(parts.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(micro_batches, "_CPU_BUDGET", 10e9)  # another free memory when it continues
    again = make(folder, tmp_path / "parts", checkpoint, **{**options, "epochs": 2})
    again.run(resume=True)
    assert again.micro_batch_size == chosen and same(again.network.state_dict(), parts.network.state_dict())
