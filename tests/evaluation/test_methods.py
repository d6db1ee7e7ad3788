"""Methods by name, and the settings that are found for a share of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from aptvit.evaluation.methods import BASELINES, UNIFORM, Conditions, Method, Prepared, Setup, parse_methods, prepare
from aptvit.hosts.pretrained import Host
from aptvit.merging import downscale

KEEP = 0.7
NAMES = (*BASELINES, "apt-entropy", "apt-embedding", "apt-laplacian", "apt-entropy-global", "apt-embedding-global")


def test_names_run_at_every_share() -> None:
    found = parse_methods(["tome", "uniform", "apt-entropy"], [0.8, 0.5])
    assert found == [UNIFORM, *(Method(name, keep) for name in ("tome", "apt-entropy") for keep in (0.8, 0.5))]
    assert [method.is_adaptive for method in found] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("tome@8", Method("tome", setting=8)),
        ("dtem-flash@0", Method("dtem-flash", setting=0)),
        ("downscale@160", Method("downscale", setting=160)),
        ("evit@0.7", Method("evit", setting=0.7)),
        ("random@0.7", Method("random", keep=0.7)),
        (" apt-upsample-global@0.5 ", Method("apt-upsample-global", keep=0.5)),
    ],
)
def test_a_value_after_the_name_is_one_setting(word: str, expected: Method) -> None:
    assert parse_methods([word, word], [0.9]) == [UNIFORM, expected]
    assert "@" in str(expected) or "%" in str(expected)


@pytest.mark.parametrize(
    ("names", "keep", "message"),
    [
        (["tomme"], [0.5], "unknown method 'tomme': use uniform, saved, random"),
        (["apt-"], [0.5], "unknown method"),
        (["apt-beauty"], [0.5], "unknown scorer 'beauty'"),
        (["tome"], [0.0], "keep=0 must be a share"),
        (["tome"], [1.5], r"keep=1\.5 must be a share"),
        (["tome@8.5"], [0.5], r"tome@8\.5: .* whole number"),
        (["downscale@0"], [0.5], "downscale@0"),
        (["apt-entropy@8"], [0.5], r"share in \(0, 1\]"),
        (["tome@many"], [0.5], "must be a number, tokens to merge in each block, a whole number"),
        (["tome@nan"], [0.5], "tome@nan"),
        (["uniform"], [0.5], "nothing to compare"),
        (["tome"], [], "nothing to compare"),
    ],
)
def test_wrong_names_and_values_are_refused(names: list[str], keep: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods(names, keep)


@pytest.fixture
def setup(load: Callable[[int | None], Host], images: Tensor) -> Setup:
    # A grid of 8 x 8 patches, and photos to calibrate on.
    return Setup(load(128), Conditions(fit_steps=2, calibration=(Path("other"),)), lambda: [images])


def entering(prepared: Prepared, images: Tensor) -> float:
    """Tokens of an image that enter attention, mean over blocks: what the qkv products of a forward read."""
    rows = []
    vit: Any = getattr(prepared.model, "vit", prepared.model)
    hooks = [
        block.attn.qkv.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[0] * x[0].shape[1]))
        for block in vit.blocks
    ]
    with torch.inference_mode():
        prepared.run(images)
    for hook in hooks:
        hook.remove()
    assert len(rows) == len(vit.blocks)
    return sum(rows) / len(rows) / len(images)


@pytest.mark.parametrize("name", NAMES)
def test_the_share_is_met_and_counted(name: str, setup: Setup, images: Tensor) -> None:
    prepared = prepare(Method(name, KEEP), setup)
    small = nn.functional.interpolate(images, size=prepared.size, mode="area")
    logits = prepared.run(small)
    assert logits.shape == (5, 10) and logits.isfinite().all() and not logits.requires_grad
    counted = prepared.tokens(small)
    assert len(counted) == 5 and sum(counted) / 5 == pytest.approx(entering(prepared, small), abs=1e-6)
    assert sum(counted) / 5 / 65 == pytest.approx(KEEP, abs=0.08)  # a side of 112 pixels is 77 %
    assert prepared.setting
    assert ("other photos" in prepared.setting) == (name.startswith("dtem") or name.endswith("global"))


@pytest.mark.parametrize("name", [*NAMES, "uniform"])
def test_with_everything_kept_each_is_the_uniform_model(name: str, setup: Setup, images: Tensor) -> None:
    prepared = prepare(Method(name, 1.0), setup)
    with torch.inference_mode():
        torch.testing.assert_close(prepared.run(images), setup.vit(images), atol=1e-4, rtol=1e-4)
    assert prepared.size == 128 and sum(prepared.tokens(images)) == 5 * 65


def test_a_setting_of_its_own_is_used_as_it_is(setup: Setup, images: Tensor) -> None:
    assert prepare(Method("tome", setting=5), setup).tokens(images) == [65 - (0 + 5 + 10 + 15) / 4] * 5
    assert prepare(Method("downscale", setting=96), setup).tokens(images) == [37.0] * 5
    # A quarter, a half and three quarters of four blocks: 1, 2 and 3; kept are ceil(0.5 n), fused are the others.
    assert prepare(Method("evit", setting=0.5), setup).tokens(images) == [(65 + 65 + 34 + 19) / 4] * 5


def test_of_the_settings_the_nearest_is_chosen(setup: Setup) -> None:
    for keep in (0.95, 0.8, 0.71, 0.64):
        means = {r: 65 - 1.5 * r for r in range(17)}  # no block runs out of tokens to merge
        expected = min(means, key=lambda r: abs(means[r] - (1 + 64 * keep)))
        assert prepare(Method("tome", keep), setup).setting == f"r = {expected}"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("tome", 0.2), "tome cannot go down to 20% of the tokens, only to "),
        (Method("evit", 0.1), "evit cannot go down to 10%"),
        (Method("apt-entropy", 0.2), r"keep=0\.2 is below the least share"),
        (Method("apt-entropy-global", 0.2), r"keep=0\.2 cannot be reached"),
        (Method("downscale", setting=100), "no multiple of the patches of 16"),
        (Method("downscale", setting=256), "up to 128"),
    ],
)
def test_what_cannot_be_reached_is_refused(method: Method, message: str, setup: Setup, images: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(method, setup).run(images)


def test_downscale_is_what_merging_makes_of_a_small_picture(setup: Setup, images: Tensor) -> None:
    small = nn.functional.interpolate(images, size=96, mode="bicubic", antialias=True)
    prepared = prepare(Method("downscale", setting=96), setup)
    with torch.inference_mode():
        torch.testing.assert_close(prepared.run(small), downscale(setup.vit, 96)(images), atol=1e-5, rtol=1e-5)
    assert setup.vit.patch_embed.img_size == (128, 128)  # the host stays as it was


def test_a_host_without_class_token_has_no_evit(make_host: Callable[..., Any], images: Tensor) -> None:
    model = make_host(class_token=False, global_pool="avg", depth=4)
    setup = Setup(Host(model, "here", {"input_size": (3, 128, 128)}), Conditions(), lambda: [images])
    with pytest.raises(ValueError, match="class token"):
        prepare(Method("evit", KEEP), setup)
    assert "these photos" in prepare(Method("apt-entropy-global", KEEP), setup).setting


def test_half_precision_is_what_models_compute_in(load: Callable[[int | None], Host], images: Tensor) -> None:
    host = load(128)
    host.model.bfloat16()
    setup = Setup(host, Conditions(dtype=torch.bfloat16, fit_steps=1), lambda: [images])
    for name in ("uniform", *NAMES):
        prepared = prepare(Method(name, KEEP), setup)
        small = nn.functional.interpolate(images, size=prepared.size, mode="area")
        with torch.inference_mode():
            assert prepared.run(small).dtype == torch.bfloat16, name


def test_models_without_a_size_of_their_own_are_compared_with_the_uniform_model_alone() -> None:
    vit = timm.create_model("naflexvit_base_patch16_gap", embed_dim=64, num_heads=2, depth=2, num_classes=5).eval()
    images = torch.randn(2, 3, 128, 128)
    setup = Setup(Host(vit, "here", {"input_size": (3, 128, 128)}), Conditions(), lambda: [images])
    assert setup.num_tokens == 64 + vit.num_prefix_tokens == setup.mean_tokens(prepare(UNIFORM, setup).model)
    adaptive = prepare(Method("apt-entropy", 0.5), setup)
    assert adaptive.model.layout(images).keep_ratio == pytest.approx(0.5, abs=0.1)
    for name in ("tome", "downscale", "resize"):
        with pytest.raises(ValueError, match="one size of images, not for NaFlexVit"):
            prepare(Method(name, 0.5), setup)
