from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import aptvit
from aptvit.hosts import get_adapter
from aptvit.hosts.timm import TimmAdapter

CLASSES = 10
THRESHOLDS = (6.5, 6.5)  # of the photos some patches of every scale pass, and some do not


def make_host(name: str, **options: Any) -> Any:
    """A small timm model without a parameter that is zero, one or tiny, so that every one of them matters."""
    host = timm.create_model(name, **{"depth": 2, "num_classes": CLASSES, **options}).eval()
    with torch.no_grad():
        for parameter_name, parameter in host.named_parameters():
            if "freqs" in parameter_name:
                continue
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in parameter_name))
            elif any(token in parameter_name for token in ("_token", "pos_embed", "latent")):
                nn.init.normal_(parameter, std=0.5)
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return host


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def run(model: nn.Module, images: Any) -> Tensor:
    return model(images)


SLIM = {"embed_dim": 192, "num_heads": 3}  # large models, made narrow

HOSTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_small_patch32_224": {"img_size": 96},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_xsmall_patch16_clip_224": {"img_size": 64},
    "vit_base_patch16_siglip_224": {"img_size": 64, **SLIM},
    "vit_base_patch16_siglip_gap_224": {"img_size": 64, **SLIM},
    "vit_so400m_patch14_siglip_224": {"img_size": 56, "embed_dim": 144, "num_heads": 2},
    "vit_intern300m_patch14_448": {"img_size": 56, **SLIM},
    "deit_tiny_patch16_224": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva02_base_patch16_clip_224": {"img_size": 64, **SLIM},
    "eva_giant_patch14_224": {"img_size": 56, "embed_dim": 176, "num_heads": 2},
    "vit_small_patch16_dinov3": {"img_size": 64},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 64},
    "vit_small_patch16_rope_224": {"img_size": 64},
    "vit_small_patch16_rope_mixed_224": {"img_size": 64},
    "vit_small_patch16_rope_ape_224": {"img_size": 64},
    "vit_small_patch16_rope_mixed_ape_224": {"img_size": 64},
    "vit_medium_patch16_rope_reg1_gap_256": {"img_size": 64},
    "vit_pe_core_tiny_patch16_384": {"img_size": 64},
    "aimv2_large_patch14_224": {"img_size": 56, "embed_dim": 256, "num_heads": 2},
    "vit_pwee_patch16_reg1_gap_256": {"img_size": 64},
    "vit_dpwee_patch16_reg1_gap_256": {"img_size": 64},
    "vit_little_patch16_reg4_gap_256": {"img_size": 64},
    "vit_base_patch16_rpn_224": {"img_size": 64, **SLIM},
    "beit3_base_patch16_224": {"img_size": 64, **SLIM},
    "vit_base_patch16_sapiens2": {"img_size": 64, **SLIM, "num_kv_heads": (3, 1)},
    "test_vit3": {"img_size": 64},
}


@pytest.mark.parametrize("name", HOSTS)
def test_with_nothing_merged_the_model_is_the_host(name: str) -> None:
    host = make_host(name, **HOSTS[name])
    images = torch.randn(2, 3, HOSTS[name]["img_size"], HOSTS[name]["img_size"])
    before = run(host, images)
    assert before.std() > 1e-3
    model = aptvit.adapt(host, thresholds=(-1.0, -1.0))
    assert model.layout(images).keep_ratio == 1
    assert relative_error(run(model, images), before) <= 1e-5
    assert torch.equal(run(host, images), before)  # the host is as it was


SIZED = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "deit3_small_patch16_224": 64,
    "eva02_tiny_patch14_224": 56,
    "vit_small_patch16_dinov3": 64,
    "vit_small_patch16_rope_mixed_224": 64,
    "vit_small_patch16_rope_mixed_ape_224": 64,
    "vit_pe_core_tiny_patch16_384": 64,
}


@pytest.mark.parametrize("name", SIZED)
def test_other_sizes_are_those_of_a_host_with_dynamic_size(name: str) -> None:
    host = make_host(name, img_size=SIZED[name])
    dynamic = timm.create_model(name, depth=2, num_classes=CLASSES, img_size=SIZED[name], dynamic_img_size=True).eval()
    dynamic.load_state_dict(host.state_dict())
    model, patch = aptvit.adapt(host, thresholds=(-1.0, -1.0)), host.patch_embed.patch_size[0]
    sizes = [(3 * patch, 6 * patch), (4 * patch, 4 * patch), (7 * patch, 5 * patch), (patch, patch)]
    images = [torch.randn(3, *size) for size in sizes]
    for image in images:
        assert relative_error(run(model, image[None]), run(dynamic, image[None])) <= 1e-5
    # An adapted dynamic host is the same, and so is a batch of all sizes.
    expected = torch.cat([run(dynamic, image[None]) for image in images])
    assert relative_error(run(model, images), expected) <= 1e-5
    assert relative_error(run(aptvit.adapt(dynamic), images), expected) <= 1e-5


def test_padding_is_that_of_timm() -> None:
    name = "vit_tiny_patch16_224"
    host = make_host(name, img_size=64, dynamic_img_size=True, dynamic_img_pad=True)
    model = aptvit.adapt(host, pad=True)
    images = torch.randn(2, 3, 50, 70)
    assert relative_error(run(model, images), run(host, images)) <= 1e-5


# Merged

POOLED: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("vit_tiny_patch16_224", {}),
    "token, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "token, pre norm": ("vit_xsmall_patch16_clip_224", {}),
    "avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "avg, no prefix": ("aimv2_large_patch14_224", {"embed_dim": 256, "num_heads": 2}),
    "avg with prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "max": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "map": ("vit_base_patch16_siglip_224", SLIM),
    "map, class token": ("test_vit3", {}),
    "prr": ("vit_tiny_patch16_224", {"global_pool": "prr"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "Eva token": ("eva02_base_patch16_clip_224", SLIM),
    "Eva avg": ("eva02_tiny_patch14_224", {}),
    "Eva max": ("eva02_tiny_patch14_224", {"global_pool": "max"}),
    "Eva avgmax": ("vit_small_patch16_dinov3", {"global_pool": "avgmax"}),
    "Eva map": ("vit_pe_core_tiny_patch16_384", {}),
    "mixed rotation": ("vit_small_patch16_rope_mixed_224", {}),
    "parallel blocks": ("vit_pwee_patch16_reg1_gap_256", {}),
    "grouped queries": ("vit_base_patch16_sapiens2", {**SLIM, "num_kv_heads": (3, 1)}),
}


def crops_of(photos: Tensor, patch: int, cells: int = 8) -> Tensor:
    """Photos as normalised images of cells x cells base patches."""
    side = patch * cells
    images = F.interpolate(photos.float(), size=(side, side), mode="bilinear", antialias=True)
    return ((images / 255 - 0.5) / 0.5).clamp(-1, 1)


@pytest.mark.parametrize("kind", POOLED)
def test_a_packed_batch_is_one_image_at_a_time(kind: str, photo_batch: Tensor) -> None:
    name, options = POOLED[kind]
    patch = 14 if "patch14" in name else 16
    host = make_host(name, img_size=8 * patch, **options)
    images = crops_of(photo_batch, patch)
    model = aptvit.adapt(host, thresholds=THRESHOLDS, init="nonzero", mean=(0.5,), std=(0.5,))
    layout = model.layout(images)
    assert len(set(layout.seqlens)) > 1 and all(sum(n) for n in zip(*layout.counts, strict=True))
    joint = run(model, images)
    separate = torch.cat([run(model, image[None]) for image in images])
    assert relative_error(joint, separate) <= 1e-5
    assert relative_error(joint, run(host, images)) > 1e-3  # merging changes something
    # An image's logits do not depend on where it stands.
    assert relative_error(run(model, images.flip(0)), joint.flip(0)) <= 1e-5
    # Equal lengths take another path.
    model.keep = 0.5
    joint = run(model, images)
    assert len(set(model.layout(images).seqlens)) == 1
    assert relative_error(joint, torch.cat([run(model, image[None]) for image in images])) <= 1e-5


@pytest.mark.parametrize("kind", ["token", "avg", "map", "Eva avg", "mixed rotation", "Eva avgmax"])
def test_images_of_many_sizes_are_one_image_at_a_time(kind: str, photos: list[Tensor]) -> None:
    name, options = POOLED[kind]
    patch = 14 if "patch14" in name else 16
    model = aptvit.adapt(make_host(name, img_size=8 * patch, **options), thresholds=THRESHOLDS, init="nonzero")
    sizes = [(6, 8), (9, 5), (6, 8), (5, 7), (8, 12)]
    images = [photo[:, 90 : 90 + h * patch, 50 : 50 + w * patch] for photo, (h, w) in zip(photos, sizes, strict=True)]
    assert len(set(model.layout(images).seqlens)) > 2
    joint = run(model, images)
    assert relative_error(joint, torch.cat([run(model, image[None]) for image in images])) <= 1e-5


def equation_2(patches: Tensor, host: Any, model: Any, factor: int) -> Tensor:
    """(n, C, factor p, factor p) -> (n, D), literally."""
    proj, p = host.patch_embed.proj, host.patch_embed.patch_size[0]
    if factor == 1:
        return proj(patches).flatten(1)
    small = F.interpolate(patches, scale_factor=1 / factor, mode="bilinear", align_corners=False, antialias=False)
    grid = F.conv2d(patches, proj.weight, proj.bias, stride=p)  # E of each sub-patch, side by side
    while grid.shape[-1] > 1:
        grid = model.coarse_embed.conv(grid)
    return proj(small).flatten(1) + model.coarse_embed.linear(grid.flatten(1))


def random_coarse_embed(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.coarse_embed.parameters():
            std = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_merged_logits_are_those_of_the_paper_written_out(name: str, native: bool, photo_batch: Tensor) -> None:
    """Token by token: Eq. 2, resampled positions, the host's blocks on each image alone, the host's head."""
    patch = 14 if "patch14" in name else 16
    host = make_host(name, img_size=(8 if native else 6) * patch)
    model = aptvit.adapt(host, thresholds=THRESHOLDS)
    random_coarse_embed(model)
    images = crops_of(photo_batch, patch)
    layout, logits = model.layout(images), run(model, images)
    class_positions = 0 if host.no_embed_class else host.num_prefix_tokens
    prefix = [token for token in (host.cls_token, host.reg_token) if token is not None]
    front = torch.cat(prefix, dim=1)[0]
    if class_positions:
        front = front + host.pos_embed[0, :class_positions]
    grid = [8 if native else 6] * 2
    for number, image in enumerate(images):
        tokens = [*front]
        for y, x, side in layout.patches(number).tolist():
            factor = side // patch
            cells = 8 // factor
            table = resample_abs_pos_embed(
                host.pos_embed[:, class_positions:], new_size=[cells, cells], old_size=grid, num_prefix_tokens=0
            )
            embedded = equation_2(image[None, :, y : y + side, x : x + side], host, model, factor)[0]
            tokens.append(embedded + table[0, y // side * cells + x // side])
        tokens = host.norm(host.blocks(host.norm_pre(torch.stack(tokens)[None])))
        assert relative_error(logits[number : number + 1], host.forward_head(tokens)) <= 2e-5


@torch.no_grad()
def test_merged_logits_with_rotary_positions_at_the_centres_written_out(photo_batch: Tensor) -> None:
    host = make_host("eva02_tiny_patch14_224", img_size=112)
    model = aptvit.adapt(host, thresholds=THRESHOLDS)
    random_coarse_embed(model)
    images = crops_of(photo_batch, 14)
    layout, logits = model.layout(images), run(model, images)
    bands = 1 / 10000 ** (np.arange(host.rope.dim // 4) / (host.rope.dim // 4))
    for number, image in enumerate(images):
        tokens, rotations = [host.cls_token[0, 0] + host.pos_embed[0, 0]], []
        for y, x, side in layout.patches(number).tolist():
            factor = side // 14
            cells = 8 // factor
            table = resample_abs_pos_embed(
                host.pos_embed[:, 1:], new_size=[cells, cells], old_size=[8, 8], num_prefix_tokens=0
            )
            embedded = equation_2(image[None, :, y : y + side, x : x + side], host, model, factor)[0]
            tokens.append(embedded + table[0, y // side * cells + x // side])
            centre = [(start / 14 + (factor - 1) / 2) / 8 * 16 for start in (y, x)]  # EVA: as on a grid of 16 x 16
            angles = np.repeat(np.concatenate([centre[0] * bands, centre[1] * bands]), 2)
            rotations.append(np.concatenate([np.sin(angles), np.cos(angles)]))
        rope = torch.tensor(np.stack(rotations), dtype=torch.float32)
        sequence = torch.stack(tokens)[None]
        for block in host.blocks:
            sequence = block(sequence, rope=rope)
        assert relative_error(logits[number : number + 1], host.forward_head(host.norm(sequence))) <= 2e-5


def test_positions_of_coarse_patches_stay_where_the_patches_are() -> None:
    """Where coarse patches do not fill the grid, their positions must not be stretched over it."""
    host = make_host("vit_tiny_patch16_224", img_size=(11 * 16, 15 * 16))
    y, x = torch.meshgrid(torch.arange(11.0), torch.arange(15.0), indexing="ij")
    with torch.no_grad():  # the first two channels name the place
        host.pos_embed[0, 1:, 0], host.pos_embed[0, 1:, 1] = y.flatten(), x.flatten()
    for factor in (2, 4):
        rows, cols = 11 // factor, 15 // factor
        table = TimmAdapter(host).position_table((11, 15), factor)
        assert table is not None and table.shape == (rows * cols, 192)
        centre_y = torch.arange(rows) * factor + (factor - 1) / 2
        centre_x = torch.arange(cols) * factor + (factor - 1) / 2
        got = table.detach()[:, :2].view(rows, cols, 2)
        expected = torch.stack(torch.meshgrid(centre_y, centre_x, indexing="ij"), dim=-1)
        torch.testing.assert_close(got, expected, atol=0.35, rtol=0)  # a resampled ramp bends at its ends
        if factor == 2:
            torch.testing.assert_close(got[1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.05, rtol=0)
    empty = TimmAdapter(host).position_table((3, 15), 4)
    assert empty is not None and empty.shape == (0, 192)


# The host


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_the_host_is_not_changed_and_shares_its_weights(name: str) -> None:
    side = 5 * (14 if "patch14" in name else 16)
    host = make_host(name, img_size=side)
    kept = copy.deepcopy(host)
    model = aptvit.adapt(host, thresholds=7.0)
    own = dict(model.named_parameters())
    for parameter_name, parameter in host.named_parameters():
        assert own[parameter_name] is parameter
    images = torch.randn(2, 3, side, side)
    expected = run(host, images)
    model.train()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    model.reset_classifier(3)
    assert not host.training and not any(module.training for module in host.modules())
    assert run(host, images).shape == (2, CLASSES) and torch.equal(run(host, images), expected)
    assert repr(host) == repr(kept)  # no module was replaced
    for (_, a), (_, b) in zip(host.named_modules(), kept.named_modules(), strict=True):
        actual, reference = ({k: v for k, v in m.__dict__.items() if isinstance(v, (bool, int, float))} for m in (a, b))
        assert actual == reference


def test_a_training_step_of_the_model_trains_the_host() -> None:
    host = make_host("vit_tiny_patch16_224", img_size=64)
    model, images = aptvit.adapt(host, thresholds=(-1.0, -1.0)), torch.randn(2, 3, 64, 64)
    before = run(host, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images).square().mean().backward()
    optimizer.step()
    model.eval()
    assert relative_error(run(host, images), before) > 1e-3
    assert relative_error(run(model, images), run(host, images)) <= 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224", "test_vit3"])
def test_state_dict_has_the_keys_of_the_host_and_a_few_of_its_own(name: str) -> None:
    host = make_host(name, img_size=64)
    new = {
        "coarse_embed.conv.weight",
        "coarse_embed.conv.bias",
        "coarse_embed.linear.weight",
        "coarse_embed.linear.bias",
    }
    model = aptvit.adapt(host)
    assert set(model.state_dict()) == set(host.state_dict()) | new
    assert set(aptvit.adapt(host, resize_only=True).state_dict()) == set(host.state_dict())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in host.named_parameters()} | new
    other = make_host(name, img_size=64)
    state = {key: value for key, value in model.state_dict().items() if key not in new}
    other.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(run(other, images), run(host, images))
    aptvit.adapt(other).load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("resnet18", {"depth": None}, "ResNet is not one of timm's"),
        ("vit_relpos_small_patch16_224", {}, "VisionTransformerRelPos is not one of"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.3}, "patch_drop_rate=0"),
        ("vit_tiny_r_s16_p8_224", {}, "not by one linear map"),
    ],
)
def test_models_that_cannot_be_adapted_are_refused_with_the_reason(
    name: str, options: dict[str, Any], reason: str
) -> None:
    options = {"depth": 1, **options}
    host = timm.create_model(name, **{key: value for key, value in options.items() if value is not None})
    with pytest.raises(ValueError, match=f"cannot adapt this model: .*{reason}"):
        aptvit.adapt(host)


def test_a_subclass_that_embeds_differently_is_refused() -> None:
    class Special(timm.models.vision_transformer.VisionTransformer):
        pass

    with pytest.raises(ValueError, match="Special changes how a VisionTransformer"):
        get_adapter(Special(img_size=32, depth=1, embed_dim=64, num_heads=2))


def test_stochastic_depth_becomes_that_of_each_image() -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.6))
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "PackedDropPath"]
    assert rates == [pytest.approx(0.6)] * 2  # the last block's two; the first has rate zero
    assert not any(type(m).__name__ == "DropPath" for m in model.modules())


# timm's protocol


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224"]
)
def test_the_model_speaks_timms_protocol(name: str) -> None:
    host = make_host(name, img_size=80)
    model = aptvit.adapt(host)
    for attribute in ("num_classes", "num_features", "embed_dim", "head_hidden_size", "global_pool", "pretrained_cfg"):
        assert getattr(model, attribute) == getattr(host, attribute)
    assert model.default_cfg["architecture"] == name
    assert model.num_prefix_tokens == host.num_prefix_tokens
    assert model.no_weight_decay() == host.no_weight_decay()
    actual, reference = model.get_classifier(), host.get_classifier()
    assert str(actual) == str(reference)
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        expected = host.forward_head(host.forward_features(images), pre_logits=True)
    for a, b in zip(pooled, expected, strict=True) if isinstance(pooled, tuple) else [(pooled, expected)]:
        assert relative_error(a, b) <= 1e-5


def test_distilled_training_returns_both_heads(photo_batch: Tensor) -> None:
    host = make_host("deit_tiny_distilled_patch16_224", img_size=128)
    host.set_distilled_training(True)
    model, images = aptvit.adapt(host, thresholds=THRESHOLDS), crops_of(photo_batch, 16)
    assert isinstance(run(model, images), Tensor)
    one, two = model.train()(images)
    with torch.no_grad():
        torch.testing.assert_close(run(model.eval(), images), (one + two) / 2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"])
def test_reset_classifier_replaces_the_head(name: str, photo_batch: Tensor) -> None:
    patch = 14 if "patch14" in name else 16
    model, images = aptvit.adapt(make_host(name, img_size=8 * patch), thresholds=6.0), crops_of(photo_batch, patch)
    run(model, images)
    model.reset_classifier(7)
    assert model.num_classes == 7 and run(model, images).shape == (5, 7)
    assert model.state_dict()["head.weight"].shape[0] == 7
    assert any(p is model.adapter.vit.head.weight for p in model.parameters())
    if "distilled" not in name:
        model.reset_classifier(0, "avg")
        pooled = run(model, images)
        means = [tokens[model.num_prefix_tokens :].mean(0) for tokens in model.forward_features(images).split()]
        torch.testing.assert_close(pooled, model.adapter.vit.fc_norm(torch.stack(means)))
        assert model.global_pool == "avg" and "head.weight" not in model.state_dict()


def test_no_pooling_needs_equal_lengths(photo_batch: Tensor) -> None:
    model = aptvit.adapt(
        make_host("vit_tiny_patch16_224", img_size=128, global_pool="", class_token=True), thresholds=6.0
    )
    with pytest.raises(ValueError, match=r"different numbers of\s+tokens"):
        run(model, crops_of(photo_batch, 16))
    model.keep = 0.5
    assert run(model, crops_of(photo_batch, 16)).shape == (5, 1 + 64 - 3 * 11, CLASSES)  # 31 is nearest to 32


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_layer_decay_puts_the_new_parameters_with_the_stem(name: str) -> None:
    model = aptvit.adapt(make_host(name, img_size=5 * (14 if "patch14" in name else 16)))
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert len(scale_of) == len(parameters)
    scales = {name: scale_of[id(p)] for name, p in parameters.items()}
    stem = scales["patch_embed.proj.weight"]
    assert (
        stem == min(scales.values()) < scales["blocks.1.mlp.fc2.weight" if "vit" in name else "blocks.1.norm1.weight"]
    )
    assert {value for key, value in scales.items() if key.startswith("coarse_embed.")} == {stem}
    assert scales["head.weight"] == 1


def expected_intermediates(host: Any, images: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return host.forward_intermediates(images, **options)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"indices": 1},
    {"indices": 2, "norm": True},
    {"indices": [0, 2]},
    {"indices": [-1, 0], "output_fmt": "NLC"},
    {"indices": (-2,), "stop_early": True},
    {"indices": [1], "stop_early": True, "intermediates_only": True, "norm": True},
    {"return_prefix_tokens": True},
    {"return_prefix_tokens": True, "output_fmt": "NLC", "norm": True, "indices": 2},
    {"intermediates_only": True, "output_fmt": "NLC"},
]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"]
)
def test_intermediates_are_those_of_the_host(name: str) -> None:
    host = make_host(name, img_size=(80, 96), depth=3)
    model, images = aptvit.adapt(host, thresholds=(-1.0, -1.0)), torch.randn(2, 3, 80, 96)
    for options in OPTIONS:
        expected = expected_intermediates(host, images, **options)
        with torch.no_grad():
            got = model.forward_intermediates(images, **options)
        if not options.get("intermediates_only"):
            (features, got), (final, expected) = got, expected
            assert relative_error(features.padded()[0], final) <= 1e-5
        assert len(got) == len(expected)
        for actual, reference in zip(got, expected, strict=True):
            pairs = (
                zip(actual, reference, strict=True) if options.get("return_prefix_tokens") else [(actual, reference)]
            )
            for a, b in pairs:
                assert relative_error(a, b) <= 1e-5


def test_wrong_intermediates_are_refused() -> None:
    model, images = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=64)), torch.randn(1, 3, 64, 64)
    for options in ({"indices": 3}, {"indices": 0}, {"indices": [2]}, {"indices": [-3]}, {"indices": []}):
        with pytest.raises(ValueError, match=r"name no blocks of 2: use 0 to 1"):
            model.forward_intermediates(images, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'NCHW' or 'NLC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


@torch.no_grad()
def test_merged_intermediates_show_each_token_at_every_cell_it_covers(photo_batch: Tensor) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=128), thresholds=THRESHOLDS)
    images = crops_of(photo_batch, 16)
    features, maps = model.forward_intermediates(images, norm=True, return_prefix_tokens=True)
    layout, tokens = features.layout, features.split()
    last, prefix = maps[-1]
    assert last.shape == (5, 192, 8, 8) and len(maps) == 2
    for image in range(5):
        assert torch.equal(prefix[image], tokens[image][:1])
        for token, (y, x, side) in zip(tokens[image][1:], layout.patches(image).tolist(), strict=True):
            area = last[image, :, y // 16 : (y + side) // 16, x // 16 : (x + side) // 16]
            assert torch.equal(area, token[:, None, None].expand_as(area))
    flat = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)[-1]
    assert torch.equal(flat, last.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_intermediates_of_many_sizes_are_lists_of_maps(photos: list[Tensor]) -> None:
    model = aptvit.adapt(make_host("vit_tiny_patch16_224", img_size=128), thresholds=THRESHOLDS)
    images = [photo[:, : 16 * (4 + i % 2), : 16 * 6] for i, photo in enumerate(photos)]
    for fmt in ("NCHW", "NLC"):
        maps = model.forward_intermediates(images, output_fmt=fmt, intermediates_only=True)[-1]
        for i, image in enumerate(images):
            separate = model.forward_intermediates(image[None], output_fmt=fmt, intermediates_only=True)[-1][0]
            assert maps[i].shape == ((192, 4 + i % 2, 6) if fmt == "NCHW" else ((4 + i % 2) * 6, 192))
            torch.testing.assert_close(maps[i], separate, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_chans", [1, 4, 12])
def test_other_numbers_of_channels(in_chans: int) -> None:
    host = make_host("vit_tiny_patch16_224", img_size=64, in_chans=in_chans)
    model = aptvit.adapt(host, thresholds=-1.0, mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    images = torch.randn(2, in_chans, 64, 64)
    assert relative_error(run(model, images), run(host, images)) <= 1e-5
    # timm's configuration has three values; its normalisation to -1..1 is the default.
    by_default = aptvit.adapt(host, thresholds=5.0)
    assert by_default.patchifier.mean == by_default.patchifier.std == (0.5,) * in_chans
    raw = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    torch.testing.assert_close(run(by_default, raw), run(by_default, raw.float() / 127.5 - 1), atol=1e-4, rtol=1e-4)


def test_rotary_training_augmentation_is_drawn_anew_for_each_batch() -> None:
    model = aptvit.adapt(
        make_host("vit_base_patch16_sapiens2", img_size=96, num_kv_heads=(3, 3), **SLIM), thresholds=-1.0
    )
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(run(model, images), run(model, images))
    model.train()
    assert not torch.allclose(run(model, images), run(model, images), atol=1e-4)
    model.eval()
    assert torch.equal(run(model, images), run(model, images))


def test_head_size_and_scale_of_the_host_are_kept() -> None:
    """Fused and unfused attention of the host agree, so that the model may fuse what the host did not."""
    host = make_host("vit_tiny_patch16_224", img_size=64)
    for block in host.blocks:
        block.attn.fused_attn = False
    images = torch.randn(1, 3, 64, 64)
    assert relative_error(run(aptvit.adapt(host), images), run(host, images)) <= 1e-5
    assert not host.blocks[0].attn.fused_attn
    assert math.isclose(host.blocks[0].attn.scale, 64**-0.5)
