"""What users do with a model besides calling it: print it, trace it, wrap it, and what they give to `adapt`."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import aptvit


def small() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=5).eval()


def brightness(pixels: Tensor, patch_size: int, factors: Any) -> dict[int, Tensor]:
    return {factor: pixels.mean(1)[:, :: patch_size * factor, :: patch_size * factor] for factor in factors}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keep": 0.5}, "keep=0.5, scales=2, scorer=entropy"),
        ({"thresholds": (5.5, 4.0), "scorer": "embedding"}, "thresholds=(5.5, 4.0), scales=3, scorer=embedding"),
        ({"keep": 0.5, "max_tokens": 9, "scorer": brightness}, "keep=0.5, max_tokens=9, scales=2, scorer=brightness"),
    ],
    ids=["keep", "thresholds", "callable"],
)
def test_the_first_line_of_print_tells_host_and_settings(options: dict[str, Any], told: str) -> None:
    first, *modules = repr(aptvit.adapt(small(), **options)).splitlines()
    assert first == f"AdaptivePatchTransformer(  # vit_tiny_patch16_224, {told}"
    host = repr(small()).splitlines()[1:-1]
    assert modules[: len(host)] == host and "coarse_embed" in "\n".join(modules)  # the modules as nn.Module prints them


def test_print_of_a_tower() -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    host = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    assert repr(aptvit.adapt(host, keep=0.5)).startswith("AdaptiveTower(  # ViTModel, keep=0.5, scales=2, scorer=ent")


@pytest.mark.parametrize("how", ["export", "onnx", "trace"])
def test_traces_of_its_own_are_refused_by_the_name_of_export(how: str) -> None:
    model, images = aptvit.adapt(small(), keep=0.5), torch.rand(1, 3, 64, 64)
    calls: dict[str, Any] = {
        "export": lambda: torch.export.export(model, (images,)),
        "onnx": lambda: torch.onnx.export(model, (images,), dynamo=True, verbose=False),
        "trace": lambda: torch.jit.trace(model, images),
    }
    with pytest.raises(Exception, match="aptvit export"):
        calls[how]()


def test_a_model_of_peft_is_refused_and_the_named_ways_work() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    host, images = small(), torch.rand(2, 3, 64, 64)
    wrapped = peft.get_peft_model(host, config)
    with pytest.raises(ValueError, match=r"adapt first .* get_peft_model, or adapt model\.get_base_model\(\)"):
        aptvit.adapt(wrapped, keep=0.5)
    with torch.no_grad():
        expected = wrapped(images)
        torch.testing.assert_close(aptvit.adapt(wrapped.get_base_model())(images), expected, atol=1e-4, rtol=1e-4)
        adaptive = peft.get_peft_model(aptvit.adapt(small()), config)
        changed = adaptive(images)
        with adaptive.disable_adapter():
            assert not torch.allclose(adaptive(images), changed, atol=1e-4)
        torch.testing.assert_close(adaptive.merge_and_unload()(images), changed, atol=1e-4, rtol=1e-4)


def test_models_of_other_libraries_are_refused_by_what_is_taken() -> None:
    from torchvision.models import resnet18

    with pytest.raises(ValueError, match=r"ResNet of torchvision is not its VisionTransformer.*docs/hosts\.md"):
        aptvit.adapt(resnet18())
    with pytest.raises(ValueError, match="Linear of torch: give a ViT of timm, transformers, torchvision or open_clip"):
        aptvit.adapt(nn.Linear(2, 2))
