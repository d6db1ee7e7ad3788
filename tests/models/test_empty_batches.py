"""A batch without images gives empty results of the shapes that full batches have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import aptvit
from aptvit.data import predict

OPTIONS: list[dict[str, Any]] = [
    {"keep": 0.5},
    {"thresholds": (4.0, 5.0), "max_batch_tokens": 100},
    {"keep": 0.5, "scorer": "preview"},
    {"keep": 0.5, "window_size": 2, "area_bias": 1.0},
    {"thresholds": 5.0, "token_bucket": 64},
]


def small(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    return timm.create_model(name, img_size=64, depth=2, num_classes=5, **options).eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_are_those_of_timm(options: dict[str, Any], training: bool) -> None:
    host = small().train(training)
    model = aptvit.adapt(host, **options)
    images = torch.zeros(0, 3, 64, 64)
    expected = host(images)
    assert expected.shape == (0, 5)
    for empty in (images, images.byte(), []):
        assert model(empty).shape == expected.shape
        assert predict(model, empty, 1000).shape == expected.shape
    layout = model.layout(images)
    assert layout.num_images == layout.num_tokens == 0 and layout.is_uniform and math.isnan(layout.keep_ratio)
    assert model(images, layout=layout).shape == expected.shape


@pytest.mark.parametrize(
    "name,options",
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
        ("vit_tiny_patch16_224", {"global_pool": ""}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_of_every_pooling(name: str, options: dict[str, Any]) -> None:
    host = small(name, **options)
    images = torch.zeros(0, 3, 64, 64)
    assert aptvit.adapt(host, keep=0.5)(images).shape == host(images).shape


def test_of_a_rotary_host_which_cannot_itself() -> None:
    """timm's Eva cannot reshape a batch of no images."""
    host = small("vit_small_patch16_dinov3")
    assert aptvit.adapt(host, keep=0.5)(torch.zeros(0, 3, 64, 64)).shape == (0, 5)


def test_features_have_the_shapes_of_a_full_batch() -> None:
    model = aptvit.adapt(small(reg_tokens=2), keep=0.5)

    def shapes(images: Tensor) -> list[tuple[int, ...]]:
        features, maps = model.forward_intermediates(images, indices=2, return_prefix_tokens=True)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        tensors = [pooled, features.prefix(), *(tensor for pair in maps for tensor in pair)]
        return [tuple(tensor.shape[1:]) for tensor in tensors]

    assert shapes(torch.zeros(0, 3, 64, 64)) == shapes(torch.rand(2, 3, 64, 64))


def test_gradients_are_zero_or_none() -> None:
    model = aptvit.adapt(small(), keep=0.5).train()
    model(torch.zeros(0, 3, 64, 64)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_of_a_tower() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    host = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    model: Any = aptvit.adapt(host, keep=0.5)
    for options in ({}, {"restore_grid": True}):
        output = model(torch.zeros(0, 3, 32, 32), output_hidden_states=True, **options)
        assert output.last_hidden_state.shape == (0, 16, 32) and output.pooler_output.shape == (0, 32)
        assert [states.shape for states in output.hidden_states] == [(0, 16, 32)] * 3
    assert predict(model, [], 1000).shape == (0, 32)


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 64, 64), torch.zeros(0, 3, 60, 64), torch.zeros(0, 64, 64)])
def test_wrong_shapes_are_refused_without_images_too(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape|60x64"):
        aptvit.adapt(small(), keep=0.5)(images)
