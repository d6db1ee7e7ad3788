from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aptvit.dense import make_segmenter

pytest.importorskip("transformers")


def shapes(count: int, side: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures of a dark ground with a bright square and a striped disc, and the class of each pixel."""
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, 3, side, side, generator=generator) * 0.2 - 0.9
    labels = torch.zeros(count, side, side, dtype=torch.long)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    for image, label in zip(images, labels, strict=True):
        top, left, cy, cx = torch.randint(4, side - 28, (4,), generator=generator).tolist()
        square = (y >= top) & (y < top + 24) & (x >= left) & (x < left + 24)
        disc = (y - cy - 12) ** 2 + (x - cx - 12) ** 2 < 144
        image[:, square] = 0.8
        label[square] = 1
        image[:, disc] = ((x // 2 % 2) * 2.0 - 1)[disc]
        label[disc] = 2
    return images, labels


def mean_iou(answers: Tensor, labels: Tensor, classes: int) -> float:
    result = []
    for one in range(classes):
        both, either = ((answers == one) & (labels == one)).sum(), ((answers == one) | (labels == one)).sum()
        result.append(float(both / either))
    return sum(result) / classes


@pytest.mark.slow  # as do the trainings of tests/training
def test_it_learns_made_up_shapes(make_host: Callable[..., Any]) -> None:
    import aptvit

    torch.manual_seed(0)
    vit = make_host("vit_tiny_patch16_224", patch_size=8, img_size=64, depth=4, embed_dim=64, num_heads=4)
    model = aptvit.adapt(vit, thresholds=(5.0, 4.0))
    segmenter = make_segmenter(model, 3, channels=32, auxiliary_channels=16)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=2e-3)
    for step in range(60):
        images, labels = shapes(8 + step % 4)
        optimizer.zero_grad()
        segmenter.loss(images, labels).backward()
        optimizer.step()
    images, labels = shapes(16)
    segmenter.eval()
    with torch.no_grad():
        answers = segmenter(images).argmax(1)
        separate = torch.stack([segmenter.predict(image).argmax(0) for image in images])
    assert model.layout(images).keep_ratio < 0.8
    assert mean_iou(answers, labels, 3) > 0.7
    assert (separate == answers).float().mean() > 0.999


def test_slide_is_the_mean_of_crops(make_model: Callable[..., Any]) -> None:
    segmenter = make_segmenter(make_model(thresholds=(5.0,)), 3, channels=16, auxiliary_channels=0).eval()
    image = torch.randn(3, 150, 200)
    got = segmenter.predict(image, mode="slide", crop=128, stride=80)
    total, count = torch.zeros(3, 150, 200), torch.zeros(150, 200)
    with torch.no_grad():
        for top in (0, 22):
            for left in (0, 72):
                total[:, top : top + 128, left : left + 128] += segmenter(
                    image[None, :, top : top + 128, left : left + 128]
                )[0].softmax(0)
                count[top : top + 128, left : left + 128] += 1
    torch.testing.assert_close(got, total / count)
    torch.testing.assert_close(got.sum(0), torch.ones(150, 200))
    small = torch.randn(3, 60, 50)  # less than one crop
    torch.testing.assert_close(
        segmenter.predict(small, mode="slide", crop=128), segmenter.predict(small), rtol=1e-5, atol=1e-6
    )


def test_channels_last_changes_nothing_but_time(make_model: Callable[..., Any], images: Tensor) -> None:
    segmenter = make_segmenter(make_model(thresholds=(5.0,)), 3, channels=16, auxiliary_channels=16).eval()
    plain = copy.deepcopy(segmenter).to(memory_format=torch.contiguous_format)
    for part in (segmenter.backbone.neck, segmenter.head, segmenter.auxiliary):
        filters = [one for one in part.parameters() if one.ndim == 4]
        assert filters and all(one.is_contiguous(memory_format=torch.channels_last) for one in filters)
    labels = torch.randint(0, 3, (5, 128, 128))
    torch.testing.assert_close(segmenter(images), plain(images), rtol=1e-5, atol=1e-5)
    for one in (segmenter, plain):
        one.loss(images, labels).backward()
    for (name, got), expected in zip(segmenter.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("scorer", ["entropy", pytest.param("preview", marks=pytest.mark.slow)])
def test_compiled_in_parts_it_says_the_same(make_model: Callable[..., Any], images: Tensor, scorer: str) -> None:
    torch.compiler.reset()
    model = make_model(keep=0.6, scorer=scorer)
    segmenter = make_segmenter(model, 3, channels=16, auxiliary_channels=16).eval()
    with torch.no_grad():
        before = [segmenter(some) for some in (images, images[:2, :, :, :64])]
        segmenter.compile(backend="eager", fullgraph=True)
        assert segmenter.head._compiled_call_impl is not None
        after = [segmenter(some) for some in (images, images[:2, :, :, :64])]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_ignored_pixels_and_bad_labels(make_model: Callable[..., Any], images: Tensor) -> None:
    segmenter = make_segmenter(make_model(thresholds=(5.0,)), 3, channels=16, auxiliary_channels=16)
    nothing = torch.full((5, 128, 128), 255)
    loss = segmenter.loss(images, nothing)
    assert loss == 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in segmenter.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="not one for each pixel"):
        segmenter.loss(images, nothing[:, :64])
    wrong = nothing.clone()
    wrong[0, 0, 0] = 3
    with pytest.raises(ValueError, match="label 3 is out of range: there are classes 0 to 2"):
        segmenter.loss(images, wrong)
    with pytest.raises(ValueError, match="four different blocks"):
        make_segmenter(make_model(), 3, indices=[0, 1, 1, 3])
    with pytest.raises(ValueError, match="at least two"):
        make_segmenter(make_model(), 1)
    with pytest.raises(ValueError, match="pixels are left out"):
        segmenter.predict(images[0], mode="slide", crop=64, stride=65)
    with pytest.raises(ValueError, match="'whole' or 'slide'"):
        segmenter.predict(images[0], mode="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 300), (300, 7)])
def test_images_smaller_than_two_patches_are_padded(make_model: Callable[..., Any], size: tuple[int, int]) -> None:
    segmenter = make_segmenter(make_model(windowed=False), num_classes=3, channels=16).eval()
    probabilities = segmenter.predict(torch.randn(3, *size))
    assert probabilities.shape == (3, *size) and torch.allclose(probabilities.sum(0), torch.ones(size))
