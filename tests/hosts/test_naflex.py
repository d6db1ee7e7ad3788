"""timm's NaFlexVit beside timm's own forward: images, batches of patches of mixed shapes, all names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn

import aptvit
from aptvit.models.naflex import AdaptiveNaFlexVit
from aptvit.patching.layout import PatchLayout

NAMES = timm.list_models("naflexvit*")
CLASSIC = ("vit_small_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3")
GRIDS = [(8, 8), (4, 10), (6, 4)]


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    small = {"use_naflex": True} if name in CLASSIC else {"embed_dim": 64, "num_heads": 4}
    vit = timm.create_model(name, depth=2, num_classes=7, **{**small, **options}).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit


def images_of(vit: Any, grids: list[tuple[int, int]] = GRIDS) -> list[Tensor]:
    side, generator = vit.embeds.patch_size[0], torch.Generator().manual_seed(0)
    return [torch.randn(3, rows * side, cols * side, generator=generator) for rows, cols in grids]


def as_patches(vit: Any, images: list[Tensor]) -> dict[str, Tensor]:
    """The padded batch of timm's NaFlex collator."""
    cut = [
        batch_patchify(image[None], vit.embeds.patch_size, channels_last=vit.embeds.channels_last) for image in images
    ]
    longest = max(patches.shape[1] for patches, _ in cut)
    batch = {
        "patches": torch.zeros(len(images), longest, cut[0][0].shape[2]),
        "patch_coord": torch.zeros(len(images), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(images), longest, dtype=torch.bool),
    }
    for number, (patches, (rows, cols)) in enumerate(cut):
        count = rows * cols
        batch["patches"][number, :count] = patches[0]
        batch["patch_coord"][number, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
        batch["patch_valid"][number, :count] = True
    return batch


@pytest.mark.parametrize("name", [*NAMES, *CLASSIC])
def test_with_nothing_merged_it_is_timms_model(name: str) -> None:
    vit = make(name)
    model, images = aptvit.adapt(vit, scales=3), images_of(vit)
    assert isinstance(model, AdaptiveNaFlexVit)
    with torch.no_grad():
        expected = torch.cat([vit(image[None]) for image in images])
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert model(images, keep=0.5).isfinite().all()


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_parfac_gap", *CLASSIC])
def test_a_padded_batch_of_patches_is_read_as_timm_reads_it(name: str) -> None:
    vit = make(name)
    model, images = aptvit.adapt(vit), images_of(vit)
    batch = as_patches(vit, images)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), vit(batch), rtol=1e-4, atol=1e-5)
        layout = model.layout(batch, keep=0.5)
        assert layout.grid_sizes == GRIDS
        torch.testing.assert_close(model(batch, layout=layout), model(images, layout=layout))


def test_poolings_with_images_of_mixed_sizes() -> None:
    vit = make("naflexvit_base_patch16_gap")
    images = images_of(vit)
    for pool in ("avg", "max", "avgmax"):
        vit.reset_classifier(7, pool)
        model = aptvit.adapt(vit, keep=0.5)
        with torch.no_grad():
            together = model(images)
            apart = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_gradients_are_timms_and_each_parameter_has_one_when_patches_merge() -> None:
    vit = make("naflexvit_base_patch16_par_gap")
    model = aptvit.adapt(vit, resize_only=True)
    images = torch.stack(images_of(vit, [(6, 6)] * 2))
    gradients = []
    for network in (vit, model):
        vit.zero_grad()
        network(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    for expected, adaptive in zip(*gradients, strict=True):
        torch.testing.assert_close(adaptive, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    model = aptvit.adapt(vit, keep=0.5, init="nonzero").train()
    vit.zero_grad()
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_positions_of_coarse_patches_are_resampled_from_those_of_the_grid() -> None:
    vit = make("naflexvit_base_patch16_gap")
    adapter = aptvit.adapt(vit).adapter
    with torch.no_grad():
        table = adapter.position_table((6, 10), 1)
        black = torch.zeros(1, 3, 96, 160)
        whole = vit.embeds(black)[0][0, vit.num_prefix_tokens :]
        torch.testing.assert_close(table + adapter.patch_embed(black[..., :16, :16]).flatten(), whole)
        assert adapter.position_table((6, 10), 2).shape == (15, 64)


def test_saved_and_loaded(tmp_path: Path) -> None:
    for name in ("naflexvit_base_patch16_gap", "vit_small_patch16_224"):
        vit = make(name)
        model, images = aptvit.adapt(vit, thresholds=(4.5,)), images_of(vit)
        model.save_pretrained(tmp_path / name)
        loaded = aptvit.from_pretrained(tmp_path / name)
        assert isinstance(loaded, AdaptiveNaFlexVit)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), model(images))


def test_bad_batches_are_named() -> None:
    vit = make("naflexvit_base_patch16_gap")
    model = aptvit.adapt(vit)
    batch = as_patches(vit, images_of(vit))
    with pytest.raises(ValueError, match="needs patch_coord"):
        model({key: value for key, value in batch.items() if key != "patch_coord"})
    with pytest.raises(ValueError, match="not 3 x 16 x 16 pixels"):
        model({**batch, "patches": batch["patches"][..., :100]})
    valid = batch["patch_valid"].clone()
    valid[0, 3] = False
    with pytest.raises(ValueError, match="image 0 has 63 patches on a grid of 8x8"):
        model({**batch, "patch_valid": valid})


def test_what_cannot_be_adapted_is_named() -> None:
    with pytest.raises(ValueError, match="patch_drop_rate"):
        aptvit.adapt(make("naflexvit_base_patch16_gap", patch_drop_rate=0.5))
    norm = make("naflexvit_base_patch16_gap")
    norm.embeds.norm_input = nn.LayerNorm(768)
    with pytest.raises(ValueError, match="not a linear map of the pixels"):
        aptvit.adapt(norm)


def test_layouts_of_users_apply_to_mixed_sizes() -> None:
    vit = make("naflexvit_base_patch16_gap")
    model, images = aptvit.adapt(vit, scales=2), images_of(vit)
    layout = model.layout(images, keep=0.5)
    assert isinstance(layout, PatchLayout) and layout.keep_ratio == pytest.approx(0.5, abs=0.05)
