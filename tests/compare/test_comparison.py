"""Side by side: what is counted, and that it works for hosts of every kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage import data
from torch import Tensor

import aptvit
from aptvit.calibration.calibrator import Target
from aptvit.compare.comparison import compare
from aptvit.files.batches import LoadedImages, NormalisedBatches, read_images
from aptvit.hosts.pretrained import Host
from aptvit.report.page import Comparison, write_report


def host_of(name: str, **options: object) -> Host:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, **options).eval()
    size = model.patch_embed.img_size
    return Host(model, "here", {**timm.data.resolve_model_data_config(model), "input_size": (3, *size)})


def side_by_side(host: Host, tmp_path: Path, wish: Target, copies: int = 1) -> Comparison:
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    paths = sorted(tmp_path.glob("*.png")) * copies
    return compare(host, "host", read_images(paths, host.data), wish, batch_size=2, rounds=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 96}),
        ("vit_base_patch16_siglip_224", {"img_size": 96, "embed_dim": 48, "num_heads": 2}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 96}),
        ("eva02_tiny_patch14_224", {"img_size": 112}),
        ("vit_tiny_patch16_224", {"img_size": 100}),  # not whole patches: the host cuts them off
    ],
)
def test_with_nothing_merged_both_sides_agree(name: str, options: dict[str, object], tmp_path: Path) -> None:
    host = host_of(name, **options)
    result = side_by_side(host, tmp_path, Target(thresholds=(-1.0,)))
    assert result.agreement == (1 if host.model.num_classes else None)  # feature models have no answers to compare
    assert result.cosine == pytest.approx(1, abs=1e-5)
    assert result.keep_ratio == 1 and result.keep_spread == (1, 1)
    assert result.gflops_adaptive == pytest.approx(result.gflops_uniform, rel=1e-3)
    for photo in result.results:
        assert [photo.image.shape[:2]] == result.image_sizes
        assert photo.tokens == photo.tokens_uniform == len(photo.patches)


class Brightness(torch.nn.Module):
    """A network around a model: a map of the mean over channels."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        (maps,) = self.model.forward_intermediates(images, indices=1, intermediates_only=True)
        return maps.mean(1).sigmoid()


def test_maps_of_a_network_around_the_model_are_correlated(tmp_path: Path) -> None:
    host = replace(host_of("vit_tiny_patch16_224", img_size=96, num_classes=0), network_of=Brightness)
    result = side_by_side(host, tmp_path, Target(keep=0.5))
    assert result.agreement is None and result.likeness_of == "correlation of the maps"
    model = aptvit.adapt(host.model, thresholds=result.thresholds)
    pixels = torch.cat(
        [*NormalisedBatches(read_images(sorted(tmp_path.glob("*.png")), host.data).pixels, host.data, 8, "cpu")]
    )
    with torch.no_grad():
        maps = [Brightness(side)(pixels) for side in (host.model, model.eval())]
    expected = sorted(np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*maps, strict=True))
    assert [photo.likeness for photo in result.results] == pytest.approx(expected, abs=1e-4)
    assert result.likeness == pytest.approx(np.mean(expected), abs=1e-4) and 0 < result.likeness < 0.9999
    page = write_report(result, tmp_path / "report").read_text()
    assert page.count("answer of the adaptive model") == 3 and f"{result.likeness:.4f}" in page
    same = side_by_side(host, tmp_path, Target(thresholds=(-1.0,)))
    assert same.likeness == pytest.approx(1, abs=1e-5)


def test_flops_are_those_of_the_tokens_counted_by_hand(tmp_path: Path) -> None:
    host = host_of("vit_tiny_patch16_224", img_size=96, num_classes=10)
    result = side_by_side(host, tmp_path, Target(keep=0.5, per_image=True))
    kept = result.results[0].tokens  # 18 of 36: 6 coarse patches and 12 base ones
    width, n = 192, kept + 1
    coarse = (36 - kept) // 3
    patches = 2 * width * 3 * 16**2 * (kept - coarse) + 2 * width * 3 * 32**2 * coarse
    blocks = 2 * (2 * n * 12 * width**2 + 4 * n**2 * width)
    assert result.gflops_adaptive * 1e9 == pytest.approx(patches + blocks + 2 * width * 10, rel=1e-6)


def test_a_file_that_cannot_be_read_does_not_stop_the_rest(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    result = side_by_side(host_of("vit_tiny_patch16_224", img_size=96), tmp_path, Target(keep=0.5))
    assert result.images == 3 and len(result.skipped) == 1 and "broken.png" in result.skipped[0]


def test_the_host_itself_is_what_is_compared_with(tmp_path: Path) -> None:
    """Accuracy of the uniform side is that of timm's own forward on timm's own transform."""
    host = host_of("vit_tiny_patch16_224", img_size=96, num_classes=10)
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    paths = sorted(tmp_path.glob("*.png"))
    transform = timm.data.create_transform(**host.data, is_training=False)
    images: list[Tensor] = [transform(Image.open(path).convert("RGB")) for path in paths]
    with torch.inference_mode():
        answers = host.model(torch.stack(images)).argmax(1).tolist()
    photos: LoadedImages = read_images(paths, host.data)
    result = compare(host, "host", photos, Target(thresholds=(-1.0,)), rounds=1, labels=answers)
    assert result.top1_uniform == result.top1_adaptive == 1


@pytest.mark.parametrize(
    "target", [Target(keep=0.5), Target(keep=0.5, per_image=True, scales=3), Target(thresholds=(5.0, 6.0))], ids=str
)
def test_the_patches_that_are_explained_are_those_that_are_drawn(target: Target, tmp_path: Path) -> None:
    result = side_by_side(host_of("vit_tiny_patch16_224", img_size=96), tmp_path, target)
    for image in result.results:
        assert image.decisions is not None
        for top, left, size in image.patches.tolist():
            patch = image.decisions.at(left, top).patch
            assert (patch.top, patch.left, patch.size) == (top, left, size)


def test_images_that_are_answered_differently_come_first(tmp_path: Path) -> None:
    """Answers are those of both models alone; names of classes are numbers where the host has none."""
    host = host_of("vit_tiny_patch16_224", img_size=96, num_classes=7)
    rng = np.random.default_rng(0)
    for i in range(12):
        size = (96, 96, 3) if i % 2 else (6, 6, 3)
        image = Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).resize((96, 96))
        image.save(tmp_path / f"{i:02d}.png")
    read = read_images(sorted(tmp_path.glob("*.png")), host.data)
    labels = list(range(7)) + [0] * 5
    target = Target(thresholds=(9.0, 9.0))  # everything merged
    result = compare(host, "host", read, target, rounds=1, labels=labels, num_drawings=8)
    model = aptvit.adapt(host.model, thresholds=(9.0, 9.0)).eval()
    images = torch.cat([*NormalisedBatches(read.pixels, host.data, 8, "cpu")])
    with torch.no_grad():
        answers = {str(path): (int(host.model(x[None]).argmax()), int(model(x[None]).argmax()), label)
                   for path, x, label in zip(read.paths, images, labels, strict=True)}  # fmt: skip
    differing = [name for name, (uniform, adaptive, _) in answers.items() if uniform != adaptive]
    same = [name for name in answers if name not in differing]
    assert differing and same
    assert [image.name for image in result.results] == [*differing, *same][:8]
    for image in result.results:
        names = tuple(f"class {number}" for number in answers[image.name])
        assert (image.prediction_uniform, image.prediction, image.truth) == names
        assert image.decisions is not None and image.decisions.at(0, 0).patch.size == image.patches[0][2]
