"""Clips beside the same frames one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from skimage import data
from torch import Tensor

import aptvit
from aptvit.encoder.clips import choose_rows, run_clip

HOSTS = [
    ("vit_tiny_patch16_224", {}),
    ("eva02_tiny_patch14_224", {"patch_size": 16}),
    ("vit_base_patch16_siglip_224", {"embed_dim": 64, "num_heads": 2}),
    ("vit_medium_patch16_reg4_gap_256", {"embed_dim": 64, "num_heads": 2}),
]


@pytest.fixture(scope="module")
def still() -> Tensor:
    """(3, 128, 128) uint8: smooth and busy parts."""
    return torch.from_numpy(data.astronaut()[100:228, 300:428]).permute(2, 0, 1).contiguous()


@pytest.fixture(scope="module")
def clip(still: Tensor) -> Tensor:
    """Five frames: nothing, then a small square appears, moves, and stays."""
    frames = still.repeat(5, 1, 1, 1)
    frames[2, :, 10:30, 10:30] = 255
    frames[3:, :, 40:60, 70:90] = 255
    return frames


@pytest.mark.parametrize("name, options", HOSTS)
@pytest.mark.parametrize("wish", [{"thresholds": (6.5, 5.5)}, {"keep": 0.6}])
def test_with_nothing_reused_frames_are_pictures(
    make_host: Callable[..., Any], clip: Tensor, name: str, options: dict[str, Any], wish: dict[str, Any]
) -> None:
    model = aptvit.adapt(make_host(name, img_size=128, depth=2, **options), init="nonzero", **wish).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_video(clip, tolerance=-1.0), model(clip), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, options", HOSTS)
def test_a_still_clip_costs_its_first_frame(
    make_host: Callable[..., Any], still: Tensor, name: str, options: dict[str, Any]
) -> None:
    model = aptvit.adapt(make_host(name, img_size=128, depth=3, **options), thresholds=(6.5, 5.5)).eval()
    frames = still.repeat(4, 1, 1, 1)
    features, clip = run_clip(model.packed_encoder, model.patchifier, frames, 0.0)
    first, *others = clip.frame_rows
    assert others == [model.num_prefix_tokens] * 3 and first == model.layout(frames[:1]).num_tokens
    logits = model.forward_head(features)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(frames), rtol=1e-4, atol=1e-4)


def test_what_changes_is_read(make_host: Callable[..., Any], clip: Tensor) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=128, depth=2), thresholds=(-1.0, -1.0)).eval()
    result = choose_rows(model.patchifier, clip, 0.0)
    # frame 2: the square touches cells 0..1 x 0..1; frame 3: it is gone there, and at cells 2..3 x 4..5
    assert result.frame_rows == [65, 1, 1 + 4, 1 + 4 + 4, 1]
    assert result.keep_ratio == (64 + 4 + 8) / (5 * 64)
    # each token is stood for by the newest row that was read at its place
    layout = result.layout
    place = result.rows[result.row_index]
    image = torch.repeat_interleave(torch.tensor(layout.seqlens))
    newest = {cell: 0 for cell in range(64)}
    for time in range(5):
        if time == 2:
            newest |= {row * 8 + col: 2 for row in (0, 1) for col in (0, 1)}
        if time == 3:
            newest |= {row * 8 + col: 3 for row in (0, 1) for col in (0, 1)}
            newest |= {row * 8 + col: 3 for row in (2, 3) for col in (4, 5)}
        tokens = layout.restore_index[time].flatten()
        assert image[place[tokens]].tolist() == [newest[cell] for cell in range(64)]


def test_reference_is_what_was_read_last_not_the_frame_before(make_host: Callable[..., Any]) -> None:
    """A slow change adds up: it is read as soon as it is more than the tolerance since the last reading."""
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=128, depth=2), thresholds=(-1.0,)).eval()
    frames = torch.full((7, 3, 128, 128), 100, dtype=torch.uint8)
    for time in range(7):
        frames[time, :, :16, :16] += time
    assert choose_rows(model.patchifier, frames, 2.0).frame_rows == [65, 1, 1, 2, 1, 1, 2]


def test_decisions_do_not_flicker(make_host: Callable[..., Any], still: Tensor) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=128, depth=2), scales=3).eval()
    aptvit.calibrate(model, still[None], keep=0.6)
    noise = torch.randint(-1, 2, (6, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    frames = (still.int() + noise).clamp(0, 255).to(torch.uint8)
    assert len({tuple(one.flatten().tolist()) for one in model.layout(frames).scale_map}) > 1
    result = choose_rows(model.patchifier, frames, 2.0)
    assert (result.layout.scale_map == result.layout.scale_map[:1]).all() and set(result.frame_rows[1:]) == {1}


def test_coarse_patches_are_reused_whole_or_not(make_host: Callable[..., Any], clip: Tensor) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=112, depth=2), thresholds=(9.0, 9.0)).eval()
    frames = clip[:, :, :112, :112].contiguous()  # 7 x 7 cells: one patch of 4 x 4, then 2 x 2, then single ones
    features, result = run_clip(model.packed_encoder, model.patchifier, frames, 0.0)
    assert result.frame_rows[1] == 1 and result.frame_rows[2] == 2  # the square lies inside the largest patch
    assert features.feature_maps().shape == (5, 192, 7, 7)
    with torch.inference_mode():
        exact = model(frames)
    torch.testing.assert_close(model.forward_head(features)[:2], exact[:2], rtol=1e-4, atol=1e-4)


def test_bad_input_is_named(make_host: Callable[..., Any], clip: Tensor) -> None:
    vit = make_host("vit_tiny_patch16_224", img_size=128, depth=2)
    model = aptvit.adapt(vit, keep=0.5).eval()
    with pytest.raises(ValueError, match="one tensor of frames"):
        model.forward_video(list(clip))
    with pytest.raises(ValueError, match=r"model\.eval"):
        model.train().forward_video(clip)
    with pytest.raises(ValueError, match="clips cannot be read in windows"):
        aptvit.adapt(vit, window_size=4).eval().forward_video(clip)


@torch.inference_mode()
def test_a_classifier_of_transformers(still: Tensor, clip: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=128
    )
    model = aptvit.adapt(transformers.ViTForImageClassification(config).eval(), thresholds=(6.5,), init="nonzero")
    torch.testing.assert_close(model.forward_video(clip, -1.0), model(clip).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_frames_that_are_filled_up(make_host: Callable[..., Any], clip: Tensor) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=128, depth=2), thresholds=(6.5,), pad=True).eval()
    frames = clip[:, :, :120, :100]
    torch.testing.assert_close(model.forward_video(frames, -1.0), model(frames), rtol=1e-4, atol=1e-4)
    assert choose_rows(model.patchifier, frames, 1.0).keep_ratio < model.layout(frames).keep_ratio
