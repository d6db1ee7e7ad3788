"""Models that version 0.1 saved load, and give the logits that they gave; see tests/data/make_saved_by_0_1.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import aptvit

DATA = Path(__file__).parents[1] / "data" / "saved_by_0_1"
# Largest difference of a logit; the bfloat16 model rounds to three digits.
FOLDERS = {"timm": 1e-5, "windows": 1e-5, "transformers": 1e-5, "glance": 3e-2}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """(3, 3, 32, 32) uint8: the crops that version 0.1 read."""
    strip = torch.from_numpy(np.array(Image.open(DATA / "images.png"))).permute(2, 0, 1)
    return torch.stack(strip.split(32, dim=2))


def expected_of(name: str) -> dict[str, Any]:
    return json.loads((DATA / name / "expected.json").read_text())


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration, without what says which version of transformers wrote it."""
    config = json.loads((folder / "config.json").read_text())
    config.get("host", {}).pop("transformers_version", None)
    return config


def assert_as_expected(model: Any, images: Tensor, expected: dict[str, Any], tolerance: float) -> None:
    assert not model.training
    assert model.thresholds == (None if expected["thresholds"] is None else tuple(expected["thresholds"]))
    for setting in ("keep", "num_scales", "area_bias"):
        assert getattr(model, setting) == expected[setting], setting
    assert list(model.layout(images).seqlens) == expected["seqlens"]
    with torch.no_grad():
        output = model(images)
    logits = getattr(output, "logits", output).float()
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", FOLDERS)
def test_saved_folders_load_and_give_the_same_logits(name: str, images: Tensor) -> None:
    model = aptvit.from_pretrained(DATA / name)
    assert_as_expected(model, images, expected_of(name), FOLDERS[name])


@pytest.mark.parametrize("name", FOLDERS)
def test_saving_a_loaded_folder_again_gives_the_same_folder(name: str, tmp_path: Path) -> None:
    aptvit.from_pretrained(DATA / name).save_pretrained(tmp_path)
    assert config_of(tmp_path) == config_of(DATA / name)
    assert aptvit.read_config(tmp_path / "config.json")["scorer"] == expected_of(name)["scorer"]
    before, after = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path))
    assert before.keys() == after.keys()
    for weight_name, weight in before.items():
        assert weight.dtype == after[weight_name].dtype and torch.equal(weight, after[weight_name]), weight_name


@pytest.mark.parametrize("name", FOLDERS)
def test_the_options_in_a_saved_folder_can_be_read(name: str) -> None:
    options, expected = aptvit.read_config(DATA / name / "config.json"), expected_of(name)
    for option in ("thresholds", "keep", "scorer"):
        assert options.get(option) == expected[option], option
    assert options.get("area_bias", 0.0) == expected["area_bias"]


def test_the_saved_options_are_not_the_defaults() -> None:
    windows = aptvit.from_pretrained(DATA / "windows")
    assert windows.window_size == 4 and set(windows.global_blocks) == {1}
    assert aptvit.read_config(DATA / "timm" / "config.json")["pad"] is True
    calibrated = aptvit.from_pretrained(DATA / "transformers")
    assert calibrated.budget.blend == 0.5 and calibrated.budget.max_tokens == 60
    assert {parameter.dtype for parameter in aptvit.from_pretrained(DATA / "glance").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["file", "training checkpoint", "bare names"])
def test_checkpoints_of_the_released_code_load_and_give_the_same_logits(
    form: str, images: Tensor, tmp_path: Path
) -> None:
    expected, file = expected_of("released"), DATA / "released" / "model.safetensors"
    checkpoint: Any = file
    if form == "training checkpoint":
        checkpoint = tmp_path / "last.ckpt"
        torch.save({"epoch": 1, "state_dict": load_file(file)}, checkpoint)
    elif form == "bare names":
        checkpoint = {key.removeprefix("net.model."): value for key, value in load_file(file).items()}
    model = aptvit.adapt(timm.create_model(**expected["host"]).eval(), **expected["options"])
    aptvit.load_released_checkpoint(model, checkpoint)
    assert_as_expected(model, images, expected, 1e-5)
