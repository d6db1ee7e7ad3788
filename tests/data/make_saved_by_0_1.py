"""Makes tests/data/saved_by_0_1: small models as version 0.1 saved them, and the logits that version 0.1 gave.

This ran once, with version 0.1.0. The data stands for files that users have on their disks: it is never to be made anew
with newer code. `tests/models/test_saved_by_0_1.py` checks that newer code reads it and gives the same logits.

    python tests/data/make_saved_by_0_1.py        # refuses to write over what is there

images.png
    Three crops of 32 x 32 pixels, side by side, that all models read.
timm, windows, glance, transformers
    A folder for each model that ``model.save_pretrained`` wrote, and expected.json beside its files.
released
    A checkpoint with the names of the paper's released code, in expected.json also how to build the model around it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import aptvit

FOLDER = Path(__file__).parent / "saved_by_0_1"
TIMM_ARGUMENTS = {"img_size": 32, "patch_size": 4, "embed_dim": 4, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}


def main() -> None:
    if aptvit.__version__ != "0.1.0":
        raise SystemExit(f"this data is what version 0.1.0 wrote, not version {aptvit.__version__}")
    if FOLDER.exists():
        raise SystemExit(f"{FOLDER} exists, and is never to be made again")
    torch.set_num_threads(1)
    crops = photo_crops()
    FOLDER.mkdir()
    Image.fromarray(np.concatenate(crops, axis=1)).save(FOLDER / "images.png", optimize=True)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    for make in (make_timm, make_windows, make_glance, make_transformers, make_released):
        torch.manual_seed(1)
        make(images)


def photo_crops() -> list[np.ndarray]:
    """Crops of real photos, each with smooth and busy parts. (32, 32, 3) uint8"""
    china = load_sample_images().images[0]
    return [
        np.ascontiguousarray(crop)
        for crop in (
            data.astronaut()[60:92, 140:172],
            data.chelsea()[84:116, 130:162],
            china[130:162, 110:142],
        )
    ]


def randomise(network: nn.Module) -> None:
    """Random weights, none of them zero, one or tiny."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim < 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
            elif "token" in name or "pos" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)


def make_timm(images: Tensor) -> None:
    """A ViT of timm with thresholds for three sizes of patches."""
    model = aptvit.adapt(
        timm.create_model("vit_tiny_patch16_224", depth=2, **TIMM_ARGUMENTS).eval(),
        thresholds=(5.2, 6.2),
        min_keep=0.2,
        mean=(0.4, 0.45, 0.5),
        std=(0.25,),
        pad=True,
        area_bias=0.5,
    )
    randomise(model)
    check_thresholds(model, images)
    save(model, images, "timm")


def make_windows(images: Tensor) -> None:
    """An Eva of timm with rotary positions, registers and windows, scored in its embedding space, with a share."""
    model = aptvit.adapt(
        timm.create_model("vit_small_patch16_dinov3", depth=2, **{**TIMM_ARGUMENTS, "num_heads": 1}).eval(),
        keep=0.5,
        scales=3,
        scorer="embedding",
        window_size=4,
        global_blocks=(1,),
        area_bias=1.0,
    )
    randomise(model)
    check_share(model, images)
    save(model, images, "windows")


def make_glance(images: Tensor) -> None:
    """A ViT of timm in bfloat16, with a fitted glance and a share."""
    model = aptvit.adapt(
        timm.create_model("vit_tiny_patch16_224", depth=1, **TIMM_ARGUMENTS).eval(), keep=0.45, scorer="glance"
    )
    randomise(model)
    aptvit.fit_glance(model, torch.cat([images, images.flip(3), images.flip(2)]), epochs=30)
    model.to(torch.bfloat16)
    check_share(model, images)
    save(model, images, "glance")


def make_transformers(images: Tensor) -> None:
    """A ViT of transformers, with a calibrated budget between thresholds and a share."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=4,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=8,
        num_labels=5,
    )
    model = aptvit.adapt(
        ViTForImageClassification(config).eval(), scorer="laplacian", scales=3, blend=0.5, max_tokens=60
    )
    randomise(model)
    aptvit.calibrate(model, images, keep=0.45)
    check_share(model, images)
    save(model, images, "transformers")


def make_released(images: Tensor) -> None:
    """A ViT under the names of the paper's released code, where several of them name one parameter."""
    host = {"model_name": "vit_tiny_patch16_224", "depth": 1, **TIMM_ARGUMENTS}
    options: dict[str, Any] = {"thresholds": (5.2, 6.2)}
    model = aptvit.adapt(timm.create_model(**host).eval(), **options)
    randomise(model)
    check_thresholds(model, images)
    aliases = {
        "coarse_embed.conv.weight": ["mixed_patch.patch_attn.weight"],
        "coarse_embed.conv.bias": ["mixed_patch.patch_attn.bias"],
        "coarse_embed.linear.weight": ["mixed_patch.zero_conv.weight"],
        "coarse_embed.linear.bias": ["mixed_patch.zero_conv.bias"],
        "cls_token": ["mixed_patch.cls_token"],
        "pos_embed": ["mixed_patch.base_pos_embed", "pos_embed"],
        "patch_embed.proj.weight": ["mixed_patch.patch_embed.proj.weight", "patch_embed.proj.weight"],
        "patch_embed.proj.bias": ["mixed_patch.patch_embed.proj.bias", "patch_embed.proj.bias"],
    }
    state = {alias: value for name, value in model.state_dict().items() for alias in aliases.get(name, [name])}
    state["mixed_patch.base_mini_pos_embed"] = torch.randn(1, 5, 4)
    (FOLDER / "released").mkdir()
    save_file(
        {f"net.model.{name}": value.clone() for name, value in state.items()}, FOLDER / "released" / "model.safetensors"
    )
    write_expected(model, images, "released", {"host": host, "options": options})


def check_thresholds(model: Any, images: Tensor) -> None:
    """No score is so close to a threshold that rounding could carry it across."""
    for _, scores in model.scores(images):
        for threshold, maps in zip(model.thresholds, scores.values(), strict=True):
            assert (maps - threshold).abs().min() > 5e-3 * threshold, (threshold, maps)
    check_mixed(model, images)


def check_share(model: Any, images: Tensor) -> None:
    """No two scores are so close that rounding could exchange them at the edge of what is merged."""
    chosen = model.layout(images).scale_map
    for _ in range(20):
        noisy = model.patchifier.normalised(images)
        noisy = noisy + 2e-3 * torch.randn_like(noisy)
        assert torch.equal(model.layout(noisy).scale_map, chosen)
    check_mixed(model, images)


def check_mixed(model: Any, images: Tensor) -> None:
    """Patches of all sizes are chosen."""
    counts = model.layout(images).counts
    assert all(sum(column) > 0 for column in zip(*counts, strict=True)), counts
    print(type(model.adapter.vit).__name__, counts)


def save(model: Any, images: Tensor, name: str) -> None:
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "README.md").unlink(missing_ok=True)
    write_expected(model, images, name, {})


def write_expected(model: Any, images: Tensor, name: str, details: dict[str, Any]) -> None:
    """Settings and results that newer code must give; ``details`` are written besides."""
    with torch.no_grad():
        output = model(images)
    logits = getattr(output, "logits", output)
    expected = {
        **details,
        "thresholds": model.thresholds,
        "keep": model.keep,
        "num_scales": model.num_scales,
        "area_bias": model.area_bias,
        "scorer": model.patchifier.scorer_name,
        "seqlens": model.layout(images).seqlens,
        "logits": logits.tolist(),
    }
    (FOLDER / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
