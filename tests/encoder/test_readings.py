from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging.test_random import of_host
from torch import Tensor

import aptvit
from aptvit.patching.layout import PatchLayout

Host = Callable[..., Any]
NAMES = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_little_patch16_reg4_gap_256"]


def corners(layout: PatchLayout) -> list[list[int]]:
    """For each image the number of the base patch in the lower right corner of each patch."""
    numbers = []
    for image, (_, columns) in enumerate(layout.grid_sizes):
        chosen = layout.image == image
        side = 2 ** layout.scale[chosen].long()
        numbers.append(((layout.row[chosen] + side - 1) * columns + layout.col[chosen] + side - 1).tolist())
    return numbers


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_host_reads_the_corners(make_host: Host, images: Tensor, name: str) -> None:
    host = make_host(name, global_pool="token") if "gap" not in name else make_host(name)
    model = aptvit.adapt(host, keep=0.4, scales=3, reading="corner").eval()
    layout = model.layout(images)
    assert layout.keep_ratio < 0.45 and (layout.scale == 2).any()
    (tokens,) = model.embed(images, layout)[0].x
    expected = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    prefix = host.num_prefix_tokens
    rows = [[*range(prefix), *(prefix + number for number in of_image)] for of_image in corners(layout)]
    for image, (start, end) in enumerate(zip(layout.packing.cu_seqlens, layout.packing.cu_seqlens[1:], strict=False)):
        torch.testing.assert_close(tokens[start:end], expected[image, rows[image]], atol=1e-5, rtol=1e-5)
    if "gap" not in name:  # pooling counts patches by their area
        torch.testing.assert_close(model(images, layout), of_host(host, images, corners(layout)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_with_nothing_merged_it_is_the_host(make_host: Host, images: Tensor) -> None:
    host = make_host()
    model = aptvit.adapt(host, keep=1.0, reading="corner").eval()
    torch.testing.assert_close(model(images), host(images))
    assert set(model.state_dict()) == set(host.state_dict())  # no branch, no new parameters


def test_training_and_images_of_several_sizes(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host(dynamic_img_size=True), keep=0.5, reading="corner")
    mixed = [images[0], images[1][:, :64], images[2][:, :, :96]]
    with torch.no_grad():
        expected = model.eval()(mixed)
    model.train()
    logits = model(mixed)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_rotary_positions_are_those_of_the_corner(make_host: Host, images: Tensor) -> None:
    model = aptvit.adapt(make_host("eva02_tiny_patch14_224", patch_size=16), keep=0.4, reading="corner").eval()
    with torch.no_grad():
        layout, uniform = model.layout(images), model.layout(images, keep=1.0)
        merged, whole = model.embed(images, layout)[0], model.embed(images, uniform)[0]
    rows, length = [], 1 + uniform.num_patches // len(images)
    for image, numbers in enumerate(corners(layout)):
        rows += [image * length, *(image * length + 1 + number for number in numbers)]
    assert merged.rotation is not None and whole.rotation is not None
    torch.testing.assert_close(merged.rotation.globally, whole.rotation.globally[rows])


@torch.no_grad()
def test_it_is_saved_and_checked(make_host: Host, images: Tensor, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host(), keep=0.5, reading="corner")
    model.save_pretrained(tmp_path)
    again = aptvit.from_pretrained(tmp_path)
    assert again.reading == "corner" and torch.equal(again(images), model(images))
    with pytest.raises(ValueError, match="reading='middle' is unknown: use 'resized', the paper's, or 'corner'"):
        aptvit.adapt(make_host(), keep=0.5, reading="middle")
    with pytest.raises(ValueError, match="reading='corner' has no graph yet"):
        from aptvit.export.graphs import ScaleSelector

        ScaleSelector(aptvit.adapt(make_host(), thresholds=5.0, reading="corner"), (128, 128))
