from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import aptvit
from aptvit.dense import DepthPyramid, DetectionBackbone, TransformersBackbone


@pytest.mark.parametrize("thresholds", [(-1.0,), (6.5, 5.5)])
def test_levels_for_torchvision(make_model: Callable[..., Any], images: Tensor, thresholds: tuple) -> None:
    backbone = DetectionBackbone(make_model(thresholds=thresholds), out_channels=32)
    levels = backbone(images)
    assert list(levels) == ["0", "1", "2", "3", "pool"]
    assert [tuple(level.shape[1:]) for level in levels.values()] == [(32, side, side) for side in (32, 16, 8, 4, 2)]
    assert backbone.stride == 64
    sum(level.square().sum() for level in levels.values()).backward()
    assert all(p.grad is not None for p in backbone.neck.parameters())
    assert backbone.model.coarse_embed.linear.weight.grad is not None


def test_maps_are_those_of_the_model(make_model: Callable[..., Any], images: Tensor) -> None:
    model = make_model(thresholds=(6.5, 5.5))
    backbone = TransformersBackbone(model, [0, 3])
    with torch.no_grad():
        out = backbone(images)
        expected = model.forward_intermediates(images, indices=[0, 3], intermediates_only=True)
    assert backbone.channels == [192, 192] and backbone.out_features == ["stage1", "stage4"]
    for actual, reference in zip(out.feature_maps, expected, strict=True):
        torch.testing.assert_close(actual, reference)


def test_big_tokens_stand_at_each_cell_and_gradients_sum_back(make_model: Callable[..., Any], images: Tensor) -> None:
    model = make_model(thresholds=(6.5, 5.5))
    layout = model.layout(images)
    tokens = torch.randn(layout.num_tokens, 5, requires_grad=True)
    maps = aptvit.PackedFeatures(tokens, layout).feature_maps()
    weight = torch.randn_like(maps)
    (maps * weight).sum().backward()
    position = 0
    for image in range(len(images)):
        mine = (layout.image == image).nonzero()[:, 0].tolist()
        for token in mine:
            row, col, side = int(layout.row[token]), int(layout.col[token]), 2 ** int(layout.scale[token])
            cells = (image, slice(None), slice(row, row + side), slice(col, col + side))
            assert (maps[cells] == tokens[position][:, None, None]).all()
            torch.testing.assert_close(tokens.grad[position], weight[cells].sum((1, 2)))
            position += 1
    assert position == layout.num_tokens


def test_heads_of_transformers_take_it(make_model: Callable[..., Any], images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    model = make_model(thresholds=(6.5, 5.5))
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[192] * 4, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=resnet, hidden_size=16, auxiliary_channels=16, num_labels=3, auxiliary_in_channels=192
    )
    uper = transformers.UperNetForSemanticSegmentation(config)
    uper.backbone = TransformersBackbone(model, [0, 1, 2, 3], neck=DepthPyramid(192))
    out = uper(pixel_values=images, labels=torch.randint(0, 3, (5, 128, 128)))
    assert out.logits.shape == (5, 3, 128, 128) and out.loss.isfinite()
    out.loss.backward()
    assert model.coarse_embed.linear.weight.grad.abs().sum() > 0

    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=128,
            embed_dim=24,
            depths=[1] * 4,
            num_heads=[1, 2, 4, 8],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )
    mask = transformers.Mask2FormerForUniversalSegmentation(config)
    module = mask.model.pixel_level_module
    module.encoder = TransformersBackbone(model, [0, 1, 2, 3], neck=DepthPyramid(192))
    module.decoder = type(module.decoder)(config, feature_channels=module.encoder.channels)
    with torch.no_grad():
        out = mask.eval()(pixel_values=images)
    assert out.masks_queries_logits.shape[:2] == (5, 5)


@torch.no_grad()
def test_dpt_reads_it_as_its_own_backbone(images: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4, "image_size": 128, "patch_size": 16}
    vit = transformers.Dinov2Config(**common)
    stages = transformers.Dinov2Config(
        **common, out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False
    )
    config = transformers.DPTConfig(
        backbone_config=stages, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, readout_type="project"
    )
    dpt = transformers.DPTForDepthEstimation(config).eval()
    host = transformers.Dinov2Model(vit).eval()
    host.load_state_dict(dpt.backbone.state_dict())
    expected = dpt(pixel_values=images).predicted_depth
    model = aptvit.adapt(host)
    dpt.backbone = TransformersBackbone(model, [0, 1, 2, 3], norm=True, sequence=True)
    torch.testing.assert_close(dpt(pixel_values=images).predicted_depth, expected, rtol=1e-4, atol=1e-5)
    model.keep = 0.6
    assert not torch.allclose(dpt(pixel_values=images).predicted_depth, expected, rtol=1e-3)
    with pytest.raises(ValueError, match="no neck"):
        TransformersBackbone(model, [0, 1], neck=DepthPyramid(32), sequence=True)
