"""Images on their way into a training: the augmentation of each depends only on seed, epoch and image."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import aptvit
from aptvit.datasets.sources import UNLABELLED, Files
from aptvit.training import ClassificationRecipe, find_sources
from aptvit.training.data import Batch, DeviceAugmentation, ImageDataset, make_loader
from aptvit.training.evaluation import score_model
from aptvit.training.objectives import Learner
from aptvit.training.sampler import FILLER, BalancedBatches, Draw

STRONG = ClassificationRecipe(crop=0.3, flip=0.5, auto_augment="rand-m9-mstd0.5-inc1")


@pytest.fixture
def data() -> dict[str, Any]:
    return timm.data.resolve_model_data_config(timm.create_model("test_vit"))


def test_augmentation_follows_from_the_seed_alone(folder: Path, data: dict[str, Any]) -> None:
    dataset = ImageDataset(find_sources(folder)[0], data, STRONG)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first, repeated, other = (dataset[Draw(3, seed)][0] for seed in (5, 5, 6))
    assert torch.equal(first, repeated) and not torch.equal(first, other) and first.dtype == torch.uint8
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_make_no_difference(folder: Path, data: dict[str, Any]) -> None:
    dataset = ImageDataset(find_sources(folder)[0], data, STRONG)
    loaders = [make_loader(dataset, BalancedBatches(20, 6, seed=1), workers) for workers in (0, 2)]
    state = torch.get_rng_state()
    for first, second in zip(*loaders, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.targets, second.targets)
    assert torch.equal(torch.get_rng_state(), state)  # loaders do not draw from the global generator


def test_without_augmentation_images_are_as_in_evaluation(folder: Path, data: dict[str, Any]) -> None:
    source = find_sources(folder)[0]
    plain, trained = ImageDataset(source, data), ImageDataset(source, data, ClassificationRecipe())
    assert torch.equal(plain[4][0], trained[Draw(4, 9)][0])
    expected = timm.data.create_transform(**data)(source.load(4)[0])
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close((plain[4][0].float() / 255 - mean) / std, expected)
    flipped = ImageDataset(source, data, ClassificationRecipe(flip=1.0))[Draw(4, 9)][0]
    assert (flipped.flip(2).float() - plain[4][0].float()).abs().mean() < 1  # resizing is symmetric but for rounding


def test_a_file_that_is_not_an_image_has_no_weight(folder: Path, data: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    (tmp_path / "train" / "cat" / "03.png").write_bytes(b"no image")
    dataset = ImageDataset(find_sources(tmp_path)[0], data, STRONG)
    (batch,) = make_loader(dataset, [[Draw(2, 0), Draw(3, 0), FILLER]], 0)
    assert batch.valid.tolist() == [True, False, False] and batch.images.shape == (3, 3, 160, 160)
    assert len(batch.problems) == 1 and "03.png" in batch.problems[0]


def test_parts_hold_all_and_are_never_empty() -> None:
    batch = Batch(torch.rand(5, 1, 2, 2), torch.arange(5), torch.ones(5, dtype=torch.bool), torch.arange(5), ["x"])
    for number in (1, 2, 5, 7):
        parts = batch.parts(number)
        assert len(parts) == number and all(len(part) for part in parts)
        valid = torch.cat([part.valid for part in parts])
        assert torch.equal(torch.cat([part.index for part in parts])[valid], torch.arange(5))


def batch_of(images: torch.Tensor) -> Batch:
    size = len(images)
    return Batch(images, torch.arange(size) % 3, torch.ones(size, dtype=torch.bool), torch.arange(size), [])


def test_targets_are_smoothed_as_timm_does(data: dict[str, Any]) -> None:
    images = torch.randint(256, (4, 3, 160, 160), dtype=torch.uint8)
    for mixing in ({}, {"mixup": 0.8, "cutmix": 1.0}):
        recipe = ClassificationRecipe(label_smoothing=0.1, **mixing)
        augment = DeviceAugmentation(data, recipe, 3, torch.device("cpu"))
        np.random.seed(0)
        augmented, targets = augment(batch_of(images))
        assert targets is not None
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        mean, std = (torch.tensor(data[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        normalised = (images.float() / 255 - mean) / std
        if not mixing:
            torch.testing.assert_close(augmented, normalised)
            hard = torch.nn.functional.one_hot(torch.arange(4) % 3, 3) * 0.9 + 0.1 / 3
            torch.testing.assert_close(targets, hard)
        else:
            np.random.seed(0)
            mixup = timm.data.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)
            expected = mixup(normalised.clone(), torch.arange(4) % 3)
            torch.testing.assert_close((augmented, targets), expected)


def test_without_labels_images_are_mixed(data: dict[str, Any]) -> None:
    images = torch.randint(256, (4, 3, 160, 160), dtype=torch.uint8)
    augment = DeviceAugmentation(data, ClassificationRecipe(mixup=0.8), 0, torch.device("cpu"))
    np.random.seed(0)
    augmented, targets = augment(batch_of(images))
    plain = augment.normalised(batch_of(images))
    assert targets is None
    share = ((augmented[0] - plain[3]) / (plain[0] - plain[3])).nanmedian()
    torch.testing.assert_close(augmented[0], plain[0] * share + plain[3] * (1 - share), atol=1e-4, rtol=1e-4)
    assert 0 < share < 1


def test_erasing_changes_the_scores(data: dict[str, Any]) -> None:
    """The augmented batch is scored: erasing replaces smooth areas by noise."""
    model = aptvit.adapt(timm.create_model("test_vit"), thresholds=5.0)
    smooth = torch.full((8, 3, 160, 160), 90, dtype=torch.uint8)
    random.seed(0)
    tokens = []
    for erasing in (0.0, 1.0):
        augment = DeviceAugmentation(data, ClassificationRecipe(erasing=erasing), 0, torch.device("cpu"))
        tokens.append(model.layout(augment(batch_of(smooth))[0]).num_tokens)
    assert tokens[1] > tokens[0]


def test_an_image_without_a_label_has_no_weight(tmp_path: Path, data: dict[str, Any]) -> None:
    """Neither in the loss nor in the scores, nor mixed into others."""
    for name in ("a.png", "b.png", "c.png", "d.png"):
        Image.new("RGB", (160, 160), (200, 100, 50)).save(tmp_path / name)
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
    source = Files(paths, [1, UNLABELLED, 2, 1], ["x", "y", "z"])
    dataset = ImageDataset(source, data, labelled=True)
    (batch,) = make_loader(dataset, [[0, 1, 2, 3]], 0)
    assert batch.valid.tolist() == [True, False, True, True] and not batch.problems
    (unlabelled,) = make_loader(ImageDataset(source, data), [[0, 1, 2, 3]], 0)
    assert unlabelled.valid.all()  # a distillation uses all images
    recipe = ClassificationRecipe(mixup=0.8, cutmix=1.0)
    augment = DeviceAugmentation(data, recipe, 3, torch.device("cpu"))
    for seed in range(6):
        np.random.seed(seed)
        _, targets = augment(batch)
        assert targets is not None and targets[batch.valid, 0].eq(0).all()  # class 0 is nobody's
    np.random.seed(0)
    nothing = Batch(batch.images, torch.full((4,), UNLABELLED), torch.zeros(4, dtype=torch.bool), batch.index, [])
    assert augment(nothing)[0].shape == batch.images.shape

    host = timm.create_model("test_vit", num_classes=3).eval()
    metrics = score_model(Learner(host), host, [batch], augment, None, Accelerator(cpu=True))
    with torch.no_grad():
        answers = host(augment.normalised(batch)).argmax(1)
    right = [int(answers[i]) == source.label(i) for i in (0, 2, 3)]
    assert metrics["top1"] == pytest.approx(sum(right) / 3)
