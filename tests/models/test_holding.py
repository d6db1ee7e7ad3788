"""ViTs of torchvision and open_clip, and timm's inside transformers, beside their own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

import aptvit

open_clip = pytest.importorskip("open_clip")

VISION: dict[str, dict[str, Any]] = {
    "CLIP": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 64},
    "mean, scaled layers": {
        **{"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 64},
        **{"pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.1, "no_ln_pre": True},
    },
    "trunk of timm": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
}


def randomised(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_clip(name: str, quick_gelu: bool = False, **options: Any) -> Any:
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    vision = open_clip.model.CLIPVisionCfg(**{**VISION[name], **options})
    return randomised(open_clip.CLIP(32, vision, text, quick_gelu=quick_gelu))


def images_for(name: str) -> Tensor:
    side = VISION[name]["image_size"]
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def make_torchvision(**options: Any) -> Any:
    sizes = {"image_size": 64, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return randomised(torchvision.models.VisionTransformer(**sizes, num_classes=5, **options))


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("name", VISION)
def test_open_clip_with_nothing_merged(name: str, quick_gelu: bool) -> None:
    clip, images = make_clip(name, quick_gelu), images_for(name)
    model = aptvit.adapt(clip, scales=2)
    assert isinstance(model, open_clip.CLIP)
    text = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = clip.encode_image(images)
        torch.testing.assert_close(model.encode_image(images), expected, rtol=1e-4, atol=1e-5)
        for adaptive, own in zip(model(images, text), clip(images, text), strict=True):
            torch.testing.assert_close(adaptive, own, rtol=1e-4, atol=1e-5)
        model.aptvit.keep = 0.5
        merged = model.encode_image(images)
    assert merged.shape == expected.shape and not torch.allclose(merged, expected, atol=1e-3)
    assert model.aptvit.layout(images).keep_ratio == pytest.approx(0.5, abs=0.05)


def test_weights_of_open_clip_are_in_the_same_memory() -> None:
    clip, images = make_clip("CLIP"), images_for("CLIP")
    model = aptvit.adapt(clip)
    with torch.no_grad():
        clip.visual.positional_embedding.mul_(0.5)
        clip.visual.proj.add_(0.1)
        clip.visual.transformer.resblocks[0].attn.in_proj_weight.mul_(0.5)
        torch.testing.assert_close(model.encode_image(images), clip.encode_image(images), rtol=1e-4, atol=1e-5)


def test_torchvision_with_nothing_merged_and_its_gradients() -> None:
    host = make_torchvision()
    model = aptvit.adapt(host, resize_only=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), host(images), rtol=1e-4, atol=1e-5)
    gradients = []
    for network in (host, model):
        host.zero_grad()
        network(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in host.parameters()])
    for adaptive, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(adaptive, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert {id(p) for p in model.parameters()} == {id(p) for p in host.parameters()}


def test_torchvision_models_are_saved_as_timm_names_them(tmp_path: Path) -> None:
    host = make_torchvision()
    model, images = aptvit.adapt(host, keep=0.5), torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(aptvit.from_pretrained(tmp_path)(images), model(images))
    assert "blocks.0.attn.qkv.weight" in model.state_dict()


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_32", "vit_h_14"])
def test_names_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        host = torchvision.models.get_model(name)
    model = aptvit.adapt(host)
    assert model.patch_size == host.patch_size and model.num_classes == 1000


def test_timm_wrapper() -> None:
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=5)
    host = randomised(transformers.TimmWrapperForImageClassification(config))
    model, images = aptvit.adapt(host), torch.randn(2, 3, 160, 160)
    assert isinstance(model, transformers.TimmWrapperForImageClassification)
    with torch.no_grad():
        expected, adaptive = (network(images, output_hidden_states=True) for network in (host, model))
        torch.testing.assert_close(adaptive.logits, expected.logits, rtol=1e-4, atol=1e-5)
        for state, own in zip(adaptive.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state, own, rtol=1e-3, atol=1e-4)
        model.aptvit.keep = 0.5
        assert model(images).logits.shape == (2, 5)
    with pytest.raises(ValueError, match="Adapt its timm_model"):
        aptvit.adapt(transformers.TimmWrapperModel(config))


def test_what_is_not_the_same_as_a_model_of_timm_is_named() -> None:
    with pytest.raises(ValueError, match="more than one layer"):
        aptvit.adapt(make_torchvision(representation_size=16))
    with pytest.raises(ValueError, match="pools tokens by attention"):
        aptvit.adapt(make_clip("CLIP", attentional_pool=True))
    with pytest.raises(ValueError, match="not its VisionTransformer"):
        aptvit.adapt(torchvision.models.resnet18())
    with pytest.raises(ValueError, match="patch_dropout"):
        aptvit.adapt(make_clip("CLIP", patch_dropout=0.5))
