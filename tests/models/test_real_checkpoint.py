"""A real checkpoint on real photos; skipped, saying so, where they are absent.

Figures of an independent prototype: ViT-Ti/16 at 224 pixels, 500 photos, entropy, two scales, no training.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from aptvit.calibration.calibrator import Target
from aptvit.compare.comparison import compare
from aptvit.files.batches import read_images
from aptvit.files.images import find_images
from aptvit.hosts.pretrained import load_host

DATA = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[2] / "data"))
CHECKPOINT = DATA / "vit_tiny" / "vit_tiny_patch16_224.safetensors"
PHOTOS = DATA / "imagenet_sample"

pytestmark = pytest.mark.skipif(
    not (CHECKPOINT.is_file() and PHOTOS.is_dir()), reason=f"no real checkpoint and photos in {DATA} (APTVIT_DATA)"
)


@pytest.mark.parametrize(
    ("every", "wish", "top1", "agreement"),
    [
        (5, Target(keep=0.67), 77.4, 87.4),
        pytest.param(1, Target(keep=0.67), 77.4, 87.4, marks=pytest.mark.slow),
        pytest.param(1, Target(keep=0.67, per_image=True), 77.6, 88.4, marks=pytest.mark.slow),
        pytest.param(1, Target(keep=0.51), 71.0, 78.8, marks=pytest.mark.slow),
        pytest.param(1, Target(keep=0.51, per_image=True), 71.8, 78.2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_accuracy_without_training_is_that_of_the_prototype(
    every: int, wish: Target, top1: float, agreement: float
) -> None:
    """All photos within a point; every fifth within two standard errors."""
    host = load_host("vit_tiny_patch16_224", CHECKPOINT)
    photos = read_images(find_images([PHOTOS])[::every], host.data)
    with (PHOTOS / "labels.csv").open(newline="") as lines:
        classes = {row["file"]: int(row["class_index"]) for row in csv.DictReader(lines)}
    labels = [classes[path.name] for path in photos.paths]
    result = compare(host, "vit_tiny_patch16_224", photos, wish, batch_size=16, rounds=1, labels=labels, num_drawings=0)
    assert len(photos.paths) == 500 // every and not photos.skipped
    assert result.top1_uniform is not None and result.top1_adaptive is not None and result.agreement is not None
    near = 1.001 if every == 1 else 8.0
    assert 100 * result.top1_uniform == pytest.approx(81.4, abs=0.01 if every == 1 else near)
    assert result.keep_ratio == pytest.approx(wish.keep, abs=0.01)
    assert 100 * result.top1_adaptive == pytest.approx(top1, abs=near)
    assert 100 * result.agreement == pytest.approx(agreement, abs=near)
