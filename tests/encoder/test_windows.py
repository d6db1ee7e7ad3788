"""Blocks that attend inside windows, against a plain dense forward of the same blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Scores, scored_grids
from torch import Tensor

import aptvit
from aptvit.hosts.adapter import share_parameters
from aptvit.layers.drop_path import PackedDropPath
from aptvit.merging import tome
from aptvit.patching.layout import PatchLayout
from aptvit.patching.selection import scales_from_thresholds

EVA = "eva02_tiny_patch14_224"


@pytest.fixture
def make_eva(make_host: Callable[..., Any]) -> Callable[..., Any]:
    """EVA-02 for 128 x 128 pixels: 8 x 8 patches, rotary and absolute positions."""

    def make(**options: Any) -> Any:
        defaults = {"patch_size": 16, "depth": 4, "class_token": False, "global_pool": "avg", "dynamic_img_size": True}
        return make_host(EVA, **{**defaults, **options})

    return make


def dense_windowed(vit: Any, images: Tensor, window: int, global_blocks: list[int]) -> list[Tensor]:
    """What the blocks of a ViT without prefix tokens give, (B, H, W, D) each, as EVA-02's detectors compute it."""
    patches = vit.patch_embed(images)  # (B, H, W, D), or (B, N, D)
    height, width = (side // 16 for side in images.shape[2:])
    x = patches.reshape(len(images), height * width, -1)
    if vit.pos_embed is not None:
        from timm.layers import resample_abs_pos_embed

        x = x + resample_abs_pos_embed(vit.pos_embed, [height, width], vit.patch_embed.grid_size, num_prefix_tokens=0)
    x = getattr(vit, "norm_pre", torch.nn.Identity())(x).unflatten(1, (height, width))

    def rotation(grid: tuple[int, int]) -> Tensor | None:
        if getattr(vit, "rope", None) is None:
            return None
        rope = share_parameters(vit.rope)
        if getattr(rope, "feat_shape", None) is None:
            return rope.get_embed(shape=grid)
        rope.update_feat_shape(list(grid))
        return rope.get_embed()

    everywhere, inside = rotation((height, width)), rotation((window, window))
    maps = []
    for number, block in enumerate(vit.blocks):
        here = everywhere if number in global_blocks else inside
        arguments = {} if here is None else {"rope": here}
        if number in global_blocks:
            x = block(x.flatten(1, 2), **arguments).unflatten(1, (height, width))
        else:
            cells = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)  # (B, h, w, win, win, D)
            out = block(cells.flatten(3, 4).flatten(0, 2), **arguments)
            x = out.view(cells.shape).transpose(2, 3).flatten(1, 2).flatten(2, 3)
        maps.append(x)
    return maps


@pytest.mark.parametrize("window, global_blocks", [(2, [1, 3]), (4, [3]), (4, []), (8, [0, 1]), (4, [0, 1, 2, 3])])
def test_with_nothing_merged_it_is_the_dense_windowed_model(
    make_eva: Callable[..., Any], images: Tensor, window: int, global_blocks: list[int]
) -> None:
    vit = make_eva()
    model = aptvit.adapt(vit, window_size=window, global_blocks=global_blocks)
    with torch.no_grad():
        expected = dense_windowed(vit, images, window, global_blocks)
        maps = model.forward_intermediates(images, indices=list(range(4)), intermediates_only=True)
        for actual, reference in zip(maps, expected, strict=True):
            torch.testing.assert_close(actual.permute(0, 2, 3, 1), reference, rtol=1e-5, atol=1e-5)
        wide = torch.cat([images, images.flip(3)], dim=3)[:2]  # 8 x 16 patches
        (actual,) = model.forward_intermediates(wide, indices=1, intermediates_only=True)
        reference = dense_windowed(vit, wide, window, global_blocks)[-1]
        torch.testing.assert_close(actual.permute(0, 2, 3, 1), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_other_hosts_can_be_windowed(make_host: Callable[..., Any], images: Tensor, name: str) -> None:
    options = {"class_token": False, "global_pool": "avg"}
    if "dinov3" in name:
        options |= {"num_reg_tokens": 0, "depth": 4}
    vit = make_host(name, **options)
    model = aptvit.adapt(vit, window_size=4, global_blocks=[1])
    with torch.no_grad():
        (actual,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
        expected = dense_windowed(vit, images, 4, [1])[-1]
    assert (actual.permute(0, 2, 3, 1) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_with_all_blocks_global_it_is_the_model_without_windows(make_host: Callable[..., Any], images: Tensor) -> None:
    vit = make_host(EVA, patch_size=16)  # with a class token
    plain = aptvit.adapt(vit, thresholds=(5.0, 4.0))
    model = aptvit.adapt(vit, thresholds=(5.0, 4.0), window_size=4, global_blocks=[0, 1])
    model.coarse_embed.load_state_dict(plain.coarse_embed.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)


def test_merged_windows_do_not_see_each_other(make_eva: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_eva(), thresholds=(6.5, 5.5), window_size=4)
    changed = images.clone()
    changed[:, :, 64:, 64:] = torch.rand_like(changed[:, :, 64:, 64:])
    assert 0.2 < model.layout(images).keep_ratio < 0.95
    with torch.no_grad():
        before, after = (
            model.forward_intermediates(one, indices=1, intermediates_only=True)[0] for one in (images, changed)
        )
    difference = (before - after).abs().amax((0, 1))
    assert difference[4:, 4:].min() > 1e-3
    difference[4:, 4:] = 0
    assert difference.max() <= 1e-6


def test_prefix_tokens_are_a_window_of_their_own(make_host: Callable[..., Any], images: Tensor) -> None:
    vit = make_host(EVA, patch_size=16)
    model = aptvit.adapt(vit, thresholds=(6.5,), window_size=4)
    with torch.no_grad():
        prefix = model.forward_features(images).prefix()
    torch.testing.assert_close(prefix, prefix[:1].expand_as(prefix))  # they have seen no image


@settings(max_examples=60, deadline=None)
@given(scored_grids(), st.integers(0, 3), st.sampled_from([4, 8]))
def test_windows_are_runs_of_the_same_order(
    case: tuple[tuple[int, int], int, int, Scores], prefix: int, window: int
) -> None:
    (rows, cols), num_scales, batch, scores = case
    rows, cols = max(rows // window, 1) * window, max(cols // window, 1) * window
    scores = {factor: torch.rand(batch, rows // factor, cols // factor) for factor in scores}
    num_scales = min(num_scales, 3)
    scale_map = scales_from_thresholds(scores, [0.5] * (num_scales - 1), (rows, cols), batch)
    layout = PatchLayout.from_scale_map(scale_map, 16, num_scales, prefix, window_size=window)
    assert layout.window_packing is not None
    assert sum(layout.window_packing.seqlens) == layout.num_tokens
    result: list[tuple] = []
    for image in range(batch):
        result += [("prefix", image)] * prefix
        mine = layout.image == image
        result += [
            (image, row // window, col // window)
            for row, col in zip(layout.row[mine].tolist(), layout.col[mine].tolist(), strict=True)
        ]
    start = 0
    for length in layout.window_packing.seqlens:
        assert len(set(result[start : start + length])) == 1
        start += length
    assert len(layout.window_packing.seqlens) == len(set(result))


def test_images_of_different_sizes(make_eva: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_eva(), thresholds=(6.5, 5.5), window_size=4, global_blocks=[1])
    mixed = [images[0], images[1, :, :64], images[2, :, :, :64]]
    with torch.no_grad():
        (joint,) = model.forward_intermediates(mixed, indices=1, intermediates_only=True)
        for image, actual in zip(mixed, joint, strict=True):
            (separate,) = model.forward_intermediates(image[None], indices=1, intermediates_only=True)
            torch.testing.assert_close(actual, separate[0], rtol=1e-5, atol=1e-5)


def test_gradients_and_checkpointing(make_eva: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_eva(), thresholds=(6.5, 5.5), window_size=4, global_blocks=[1]).train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        (out,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
        out.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "coarse_embed.linear.weight" in gradients[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def test_stochastic_depth_drops_images_not_windows(make_eva: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_eva(drop_path_rate=0.9, depth=2), thresholds=(6.5,), window_size=4).train()
    factors: list[Tensor] = []
    for module in model.blocks.modules():
        if isinstance(module, PackedDropPath) and module.drop_prob > 0.5:
            module.register_forward_hook(lambda _, inputs, out: factors.append((out / inputs[0])[0]))
    batch = torch.cat([images] * 4)
    layout = model.layout(batch)
    with torch.no_grad():
        model(batch, layout)
    assert factors
    for factor in factors:
        of_image = [rows.unique() for rows in factor.split(layout.seqlens)]
        assert all(len(rows) == 1 or rows.max() - rows.min() < 1e-3 for rows in of_image)
    assert len({round(float(rows[0])) for rows in of_image}) == 2  # some dropped, some scaled


def test_saved_loaded_copied(make_eva: Callable[..., Any], images: Tensor, tmp_path: Path) -> None:
    model = aptvit.adapt(make_eva(), thresholds=(6.5, 5.5), window_size=4, global_blocks=[1, 3])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(images)
        for other in (
            aptvit.from_pretrained(tmp_path),
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
        ):
            assert torch.equal(other(images), expected)


def test_compiled(make_eva: Callable[..., Any], images: Tensor) -> None:
    model = aptvit.adapt(make_eva(depth=2), thresholds=(6.5, 5.5), window_size=4, global_blocks=[1])
    with torch.no_grad():
        expected = model(images)
        model.compile(backend="eager")
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(model(images[:2]), expected[:2])


def test_bad_input_is_named(make_eva: Callable[..., Any], images: Tensor) -> None:
    vit = make_eva()
    with pytest.raises(ValueError, match="window size 64"):
        aptvit.adapt(vit, window_size=4)(images[:, :, :100])
    padded = aptvit.adapt(vit, window_size=4, pad=True)
    assert padded.layout(images[:, :, :100]).grid_sizes[0] == (8, 8)
    with pytest.raises(ValueError, match="does not hold whole patches of 4: use a multiple of 4"):
        aptvit.adapt(vit, window_size=2, thresholds=(1.0, 1.0))(images)
    with pytest.raises(ValueError, match="without window_size"):
        aptvit.adapt(vit, global_blocks=[1])
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        aptvit.adapt(vit, window_size=4, global_blocks=[4])
    with pytest.raises(ValueError, match="at least one"):
        aptvit.adapt(vit, window_size=0)
    model, plain = aptvit.adapt(vit, window_size=4, keep=0.5), aptvit.adapt(vit)
    with pytest.raises(ValueError, match="not a function of the tokens with windows of 4 patches: ask for keep="):
        aptvit.calibrate(model, images, gflops=1.0)
    with pytest.raises(ValueError, match="merging in the blocks does not support windows"):
        tome(model, r=2)
    with pytest.raises(ValueError, match="do not agree on windows"):
        model(images, plain.layout(images))
