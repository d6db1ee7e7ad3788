from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import aptvit
from aptvit.hosts.pretrained import load_host

Host = Callable[..., Any]
THRESHOLDS = (6.5, 6.5)


def run(model: nn.Module, images: Any) -> Tensor:
    with torch.no_grad():
        return model(images)


def narrow(model: Any) -> None:
    model.to(torch.bfloat16)


# name: (host options, options of adapt, what happens afterwards)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Any], object] | None]] = {
    "thresholds": ({}, {"thresholds": THRESHOLDS, "init": "nonzero"}, None),
    "keep": ({}, {"keep": 0.4, "scales": 3, "init": "residual"}, None),
    "nothing merged": ({}, {"scales": 4}, None),
    "one scale": ({}, {"scales": 1}, None),
    "laplacian": ({}, {"thresholds": 0.3, "scorer": "laplacian"}, None),
    "resize only": ({}, {"thresholds": THRESHOLDS, "resize_only": True}, None),
    "statistics and padding": ({}, {"keep": 0.5, "mean": (0.1, 0.2, 0.3), "std": (0.3,), "pad": True}, None),
    "another head": ({}, {"thresholds": THRESHOLDS}, lambda model: model.reset_classifier(7)),
    "no head": ({}, {"thresholds": THRESHOLDS}, lambda model: model.reset_classifier(0)),
    "another pooling": ({}, {"thresholds": THRESHOLDS}, lambda model: model.reset_classifier(7, "avg")),
    "another size": ({"img_size": (96, 160)}, {"thresholds": THRESHOLDS}, None),
    "bfloat16": ({}, {"thresholds": THRESHOLDS}, narrow),
    "budget set later": ({}, {"scales": 2}, lambda model: setattr(model, "thresholds", THRESHOLDS)),
    "average pooling": ({"global_pool": "avg"}, {"thresholds": THRESHOLDS}, None),
    "DINOv3": ({"name": "vit_small_patch16_dinov3"}, {"thresholds": THRESHOLDS}, None),
    "EVA-02": ({"name": "eva02_tiny_patch14_224", "img_size": 112}, {"keep": 0.5}, None),
    "mixed rotation": ({"name": "vit_small_patch16_rope_mixed_224"}, {"thresholds": THRESHOLDS}, None),
    "distilled": ({"name": "deit_tiny_distilled_patch16_224"}, {"thresholds": THRESHOLDS}, None),
    "gray": ({"in_chans": 1}, {"keep": 0.5, "mean": (0.5,), "std": (0.5,)}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_comes_back_bit_for_bit(make_host: Host, images: Tensor, tmp_path: Path, case: str) -> None:
    host_options, options, change = CASES[case]
    host = make_host(**host_options)
    model = aptvit.adapt(host, **options)
    if change is not None:
        change(model)
    height, width = host.patch_embed.img_size
    images = torch.nn.functional.interpolate(images[:, : model.in_chans], size=(height, width), mode="area")
    model.save_pretrained(tmp_path / "saved")
    loaded = aptvit.from_pretrained(tmp_path / "saved")
    assert not loaded.training
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)
    for attribute in ("thresholds", "keep", "num_scales", "resize_only", "num_classes", "global_pool", "patch_size"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    for attribute in ("mean", "std", "pad", "scorer_name"):
        assert getattr(loaded.patchifier, attribute) == getattr(model.patchifier, attribute)
    assert loaded.layout(images).seqlens == model.layout(images).seqlens
    before, after = run(model, images), run(loaded, images)
    assert before.dtype == after.dtype and torch.equal(before, after)


def test_a_folder_written_twice_holds_the_later_model(make_host: Host, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host(depth=1), thresholds=1.0)
    model.save_pretrained(tmp_path)
    model.keep = 0.5
    model.save_pretrained(tmp_path)
    assert aptvit.from_pretrained(tmp_path).keep == 0.5


def test_the_class_loads_too(make_host: Host, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host(depth=1), thresholds=1.0)
    model.save_pretrained(tmp_path)
    loaded = aptvit.AdaptivePatchTransformer.from_pretrained(tmp_path)
    assert loaded.thresholds == (1.0,)
    assert torch.equal(loaded.state_dict()["head.weight"], model.state_dict()["head.weight"])


def test_config_says_how_to_build_the_model(make_host: Host, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host(depth=1), thresholds=(5.5, 4.0))
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["library"] == "timm"
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"]["img_size"] == [128, 128] and config["model_args"]["depth"] == 1
    assert config["num_classes"] == 7 and config["dtype"] == "float32"
    assert config["aptvit"] == {
        "thresholds": [5.5, 4.0],
        "keep": None,
        "blend": None,
        "min_keep": 0.0,
        "max_tokens": None,
        "max_batch_tokens": None,
        "scales": 3,
        "scorer": "entropy",
        "resize_only": False,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "pad": False,
    }
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_what_cannot_be_loaded_again_is_not_saved(make_host: Host, tmp_path: Path) -> None:
    host = make_host(depth=1)
    with pytest.raises(ValueError, match="scorer that is a callable cannot be saved"):
        aptvit.adapt(host, scorer=lambda pixels, patch, factors: {}).save_pretrained(tmp_path)
    nameless = make_host(depth=1)
    nameless.pretrained_cfg = None
    with pytest.raises(ValueError, match="no name to build it from"):
        aptvit.adapt(nameless).save_pretrained(tmp_path)
    altered = make_host(depth=2)
    altered.blocks = altered.blocks[:1]
    with pytest.raises(ValueError, match=r"not what its name 'vit_tiny_patch16_224' .* builds? .*blocks\.1"):
        aptvit.adapt(altered).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "config.json").exists()


def test_folders_that_do_not_hold_a_model_are_refused(make_host: Host, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no config\.json in"):
        aptvit.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor the name of a hub repository"):
        aptvit.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a folder nor"):
        aptvit.from_pretrained("vit_tiny")
    aptvit.adapt(make_host(depth=1)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no model\.safetensors in"):
        aptvit.from_pretrained(tmp_path)
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of its configuration"):
        aptvit.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with pytest.raises(ValueError, match="describes no adaptive model"):
        aptvit.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor"):
        aptvit.from_pretrained(tmp_path / "config.json")


def test_weights_that_share_memory_are_saved(make_host: Host, images: Tensor, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host(depth=1), thresholds=THRESHOLDS)
    whole = torch.randn(2, 192)
    model.blocks[0].norm1.bias = nn.Parameter(whole[0])
    model.blocks[0].norm2.bias = nn.Parameter(whole[1])
    model.save_pretrained(tmp_path)
    assert torch.equal(run(aptvit.from_pretrained(tmp_path), images), run(model, images))


# Checkpoints of the released code


def released(model: Any, wrap: bool = True) -> dict[str, Any]:
    """The model's weights under the names of the released code, its aliases included."""
    state = model.state_dict()
    names = {
        "coarse_embed.conv.weight": ["mixed_patch.patch_attn.weight"],
        "coarse_embed.conv.bias": ["mixed_patch.patch_attn.bias"],
        "coarse_embed.linear.weight": ["mixed_patch.zero_conv.weight"],
        "coarse_embed.linear.bias": ["mixed_patch.zero_conv.bias"],
        "cls_token": ["mixed_patch.cls_token"],
        "pos_embed": ["mixed_patch.base_pos_embed", "pos_embed"],
        "patch_embed.proj.weight": ["mixed_patch.patch_embed.proj.weight", "patch_embed.proj.weight"],
        "patch_embed.proj.bias": ["mixed_patch.patch_embed.proj.bias", "patch_embed.proj.bias"],
    }
    translated = {alias: value for key, value in state.items() for alias in names.get(key, [key])}
    translated["mixed_patch.base_mini_pos_embed"] = torch.randn(1, 5, 192)
    if not wrap:
        return translated
    return {"epoch": 3, "state_dict": {f"net.{key}": value for key, value in translated.items()}}


@pytest.mark.parametrize("form", ["wrapped", "bare", "file", "safetensors", "model", "module"])
def test_released_checkpoints_load(make_host: Host, images: Tensor, tmp_path: Path, form: str) -> None:
    trained = aptvit.adapt(make_host(), thresholds=THRESHOLDS, init="nonzero")
    checkpoint: Any = released(trained, wrap=form in ("wrapped", "file"))
    if form == "file":
        torch.save(checkpoint, tmp_path / "last.ckpt")
        checkpoint = tmp_path / "last.ckpt"
    elif form == "safetensors":
        save_file({key: value.clone() for key, value in checkpoint.items()}, tmp_path / "m.safetensors")
        checkpoint = str(tmp_path / "m.safetensors")
    elif form == "model":
        checkpoint = {"model": checkpoint}
    elif form == "module":
        checkpoint = {"state_dict": {f"module._orig_mod.{key}": value for key, value in checkpoint.items()}}
    model = aptvit.adapt(make_host(), thresholds=THRESHOLDS)
    assert not torch.equal(run(model, images), run(trained, images))
    assert aptvit.load_released_checkpoint(model, checkpoint) is model
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(run(model, images), run(trained, images))


def test_wrong_released_checkpoints_are_refused_and_change_nothing(make_host: Host, tmp_path: Path) -> None:
    model = aptvit.adapt(make_host(), thresholds=THRESHOLDS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = released(aptvit.adapt(make_host(), init="nonzero"), wrap=False)

    def without(*names: str) -> dict[str, Tensor]:
        return {key: value for key, value in good.items() if not key.startswith(names)}

    for checkpoint, message in (
        (without("mixed_patch.zero_conv"), r"missing: coarse_embed\.linear\.bias, coarse_embed\.linear\.weight"),
        (without("blocks.1"), r"missing: blocks\.1\..*\.\.\."),
        ({**good, "neck.weight": torch.zeros(2)}, r"unknown: neck\.weight"),
        ({**good, "head.weight": torch.zeros(1000, 192)}, r"of another shape: head\.weight"),
        (aptvit.adapt(make_host(depth=3)).state_dict(), r"unknown: blocks\.2"),
        ({}, "missing"),
    ):
        with pytest.raises(ValueError, match=message):
            aptvit.load_released_checkpoint(model, checkpoint)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        aptvit.load_released_checkpoint(model, tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="resize_only model has no place"):
        aptvit.load_released_checkpoint(aptvit.adapt(make_host(), resize_only=True), good)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class Payload:
    """What pickle runs when it is read without ``weights_only``."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "bin"])
def test_checkpoints_of_others_run_no_code(tmp_path: Path, suffix: str, make_host: Any) -> None:
    file = tmp_path / f"weights.{suffix}"
    torch.save({"state_dict": {"cls_token": torch.zeros(1)}, "args": Payload(tmp_path / "touched")}, file)
    with pytest.raises(ValueError, match="does not fit test_vit"):
        load_host("test_vit", file)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        aptvit.load_released_checkpoint(aptvit.adapt(make_host(), thresholds=(5.0,)), file)
    assert not (tmp_path / "touched").exists()
