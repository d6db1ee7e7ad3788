"""What must hold after the statements of README.md, docs/start/tutorial.md and docs/how-to/choose.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from snippets.checks import (
    Page,
    after,
    close,
    covers_each_cell_once,
    is_cut_by_thresholds,
    is_for_each_image_what_it_is_alone,
    is_the_host_with_nothing_merged,
    keeps_of_each_image,
)
from torch import Tensor

import aptvit
from aptvit.measuring.operations import count_flops, countable_attention


@after("model = aptvit.adapt(vit, keep=0.5)")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
    keeps_of_each_image(page.model.layout(page.images), 0.5)


@after("logits = model(images)")
@torch.no_grad()
def _(page: Page) -> None:
    is_for_each_image_what_it_is_alone(page.model, page.images, page.logits)
    mixed = [page.images[0], page.images[-1][:, :96, :64]]
    close(page.model(mixed), torch.cat([page.model(image[None]) for image in mixed]))


@after("model = aptvit.adapt(vit, thresholds=(5.5, 4.0))")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
    is_cut_by_thresholds(page.model, page.images, (5.5, 4.0))


@after("aptvit.calibrate(model, sample_images, keep=0.5)")
def _(page: Page) -> None:
    assert page.value == page.model.thresholds and len(page.value) == 2
    assert page.model.layout(page.sample_images).keep_ratio == pytest.approx(0.5, abs=0.06)  # 4x patches are 15 tokens


@after("aptvit.calibrate(model, batches, gflops=30)")
@torch.no_grad()
def _(page: Page) -> None:
    head = 2 * page.vit.head.weight.numel()
    with countable_attention(page.model, "cpu"):
        page.model(page.images)
        each = [count_flops(lambda image=image: page.model(image[None])) - head for image in page.images]
    assert np.mean(each) / 1e9 == pytest.approx(0.03, rel=0.06)


@after('model = aptvit.from_pretrained("tuned")')
@torch.no_grad()
def _(page: Page) -> None:
    close(page.model(page.images), page.written(page.images))


@after("model.thresholds = (6.0, 6.0)")
def _(page: Page) -> None:
    is_cut_by_thresholds(page.model, page.images, (6.0, 6.0))


@after("logits = model(images, keep=0.3)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.logits, aptvit.adapt(page.vit, keep=0.3, scales=3)(page.images))
    assert page.model.thresholds == (6.0, 6.0) and page.model.keep is None


@after("layout = model.layout(images)")
def _(page: Page) -> None:
    covers_each_cell_once(page.layout)
    kept = sum(len(page.layout.patches(image)) for image in range(len(page.images)))
    assert page.layout.keep_ratio == kept / (64 * len(page.images)) < 1


@after("model = aptvit.adapt(vit, **aptvit.read_config('config.json'))")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
    is_cut_by_thresholds(page.model, page.images, page.written.thresholds)


def noise(count: int, side: int) -> Tensor:
    """Pictures in which there is nothing to merge."""
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


@after("model = aptvit.adapt(vit, thresholds=(6.0,), max_tokens=300, max_batch_tokens=2048)")
def _(page: Page) -> None:
    is_cut_by_thresholds(page.model, page.images, (6.0,))  # which need no limits
    assert aptvit.adapt(page.vit, thresholds=(6.0,)).layout(noise(1, 320)).seqlens == [401]
    assert 297 < page.model.layout(noise(1, 320)).max_seqlen <= 300
    few = page.model.layout(noise(8, 320))
    assert 2045 < few.num_tokens <= 2048 and few.max_seqlen <= 300


@after("model = aptvit.adapt(vit, thresholds=(6.0,), min_keep=0.3)")
def _(page: Page) -> None:
    gray = torch.full_like(page.images, 128)
    assert aptvit.adapt(page.vit, thresholds=(6.0,)).layout(gray).keep_ratio == 0.25
    assert 0.3 <= page.model.layout(gray).keep_ratio < 0.3 + 3 / 64
    is_cut_by_thresholds(page.model, page.images, (6.0,))


@after("model = aptvit.adapt(vit, blend=0.5)")
def _(page: Page) -> None:
    photos = torch.cat([page.images, torch.full_like(page.images[:1], 128)])
    aptvit.calibrate(page.model, photos, keep=0.5)
    blended = page.model.layout(photos)
    assert blended.keep_ratio == pytest.approx(0.5, abs=0.03)
    by_share, by_thresholds = (
        aptvit.adapt(page.vit, **options).layout(photos).seqlens
        for options in ({"keep": page.model.keep}, {"thresholds": page.model.thresholds})
    )
    assert len(set(by_share)) == 1 and len(set(by_thresholds)) > 1
    for found, share, threshold in zip(blended.seqlens, by_share, by_thresholds, strict=True):
        assert abs(found - (share + threshold) / 2) <= 1.5  # three tokens a merge


@after("photo = Image.open('photo.jpg').convert('RGB').resize((384, 384))")
def _(page: Page) -> None:
    assert (page.photo.mode, page.photo.size) == ("RGB", (128, 128))


@after("images = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]")
def _(page: Page) -> None:
    assert page.images.shape == (1, 3, 128, 128) and page.images.dtype == torch.uint8
    assert tuple(page.images[0, :, 5, 90].tolist()) == page.photo.getpixel((90, 5))


@after("model = aptvit.adapt(vit, keep=0.5, scorer='harm')")
def _(page: Page) -> None:
    assert page.model.patchifier.scorer_name == "harm"


@after("aptvit.fit_harm(model, images)")
def _(page: Page) -> None:
    keeps_of_each_image(page.model.layout(page.images), 0.5)
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)


@after("model = aptvit.adapt(vit, keep=0.5, scorer='embedding', reading='corner')")
def _(page: Page) -> None:
    assert page.model.reading == "corner"
    keeps_of_each_image(page.model.layout(page.images), 0.5)
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)


@after("model = aptvit.adapt(vit, scorer='exact', thresholds=(1.0, 1.0, 1.0))")
def _(page: Page) -> None:
    white = torch.ones_like(page.images[:1])
    layout = page.model.layout(torch.cat([white, page.images[:1]]))
    assert len(layout.patches(0)) < len(layout.patches(1))
    is_the_host_with_nothing_merged(page.model, page.vit, page.images)
