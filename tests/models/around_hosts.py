"""Models of transformers around a ViT, with tiny random configurations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["HOSTS", "Example", "make"]

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
SMALL = {**TINY, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {
    **{"d_model": 32, "num_queries": 6, "decoder_layers": 1, "decoder_ffn_dim": 32, "group_detr": 1},
    **{"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "decoder_n_points": 2},
}
WORDS = {"input_ids": torch.tensor([[1, 5, 6, 2]] * 2)}


@dataclass
class Example:
    """A host and what it reads.

    Attributes:
        host: The model, in eval mode.
        inputs: Arguments beside the images.
        sizes: Shapes of batches that it takes.
        read: The tensor of its output that is compared.
        name: Of the argument with images.
        tolerance: Largest difference with nothing merged, relative to the largest output.
    """

    host: Any
    read: Callable[[Any], Tensor]
    sizes: list[tuple[int, ...]]
    inputs: dict[str, Any] = field(default_factory=dict)
    name: str = "pixel_values"

    def images(self, number: int = 0, seed: int = 0) -> Tensor:
        return torch.randn(2, *self.sizes[number], generator=torch.Generator().manual_seed(seed))

    def __call__(self, model: Any, images: Tensor, **options: Any) -> Tensor:
        return self.read(model(**{self.name: images}, **self.inputs, **options))


def _maps(output: Any) -> Tensor:
    """The feature maps of a backbone. (B, numbers)"""
    return torch.cat([feature_map.flatten(1) for feature_map in output.feature_maps], 1)


def _dinov2(kind: str = "Dinov2Config", **options: Any) -> Any:
    return getattr(transformers, kind)(
        **TINY, image_size=112, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, **options
    )


def _dpt_options() -> dict[str, Any]:
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return {**sizes, "head_hidden_size": 8, "patch_size": 14}


def depth_anything() -> Example:
    config = transformers.DepthAnythingConfig(backbone_config=_dinov2(apply_layernorm=True), **_dpt_options())
    host = transformers.DepthAnythingForDepthEstimation(config)
    return Example(host, lambda out: out.predicted_depth, [(3, 112, 168), (3, 140, 84)])


def depth_anything_registers() -> Example:
    backbone = _dinov2("Dinov2WithRegistersConfig", num_register_tokens=3, apply_layernorm=True)
    config = transformers.DepthAnythingConfig(backbone_config=backbone, **_dpt_options())
    # Its neck drops the class token alone: registers would be cells. The backbone itself, as users call it.
    host = transformers.AutoBackbone.from_config(config.backbone_config)
    return Example(host, _maps, [(3, 112, 168)])


def prompt_depth_anything() -> Example:
    config = transformers.PromptDepthAnythingConfig(backbone_config=_dinov2(apply_layernorm=True), **_dpt_options())
    host = transformers.PromptDepthAnythingForDepthEstimation(config)
    depth = {"prompt_depth": torch.rand(2, 1, 24, 32)}
    return Example(host, lambda out: out.predicted_depth, [(3, 112, 168)], depth)


def dpt() -> Example:
    config = transformers.DPTConfig(
        **SMALL,
        image_size=64,
        patch_size=8,
        is_hybrid=False,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
    )
    return Example(transformers.DPTForDepthEstimation(config), lambda out: out.predicted_depth, [(3, 64, 64)])


def dpt_on_dinov2() -> Example:
    backbone = _dinov2()
    config = transformers.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, hidden_size=32, num_labels=3
    )
    return Example(transformers.DPTForDepthEstimation(config), lambda out: out.predicted_depth, [(3, 112, 112)])


def zoedepth() -> Example:
    backbone = _beit_config("BeitConfig", out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_relative_features=8,
        bin_embedding_dim=8,
        patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=8,
        patch_transformer_num_attention_heads=2,
        reassemble_factors=[4, 2, 1, 0.5],
        bin_configurations=[{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
        num_attractors=[2, 2, 1, 1],
    )
    return Example(transformers.ZoeDepthForDepthEstimation(config), lambda out: out.predicted_depth, [(3, 64, 64)])


def _eomt(kind: str, masked: bool, **options: Any) -> Example:
    config = getattr(transformers, f"{kind}Config")(
        **TINY,
        image_size=128,
        patch_size=16,
        num_blocks=2,
        num_queries=5,
        num_register_tokens=2,
        num_upscale_blocks=1,
        **options,
    )
    host = getattr(transformers, f"{kind}ForUniversalSegmentation")(config)
    host.attn_mask_probs.fill_(1.0 if masked else 0.0)
    return Example(host, lambda out: out.masks_queries_logits, [(3, 128, 128)])


def eomt() -> Example:
    return _eomt("Eomt", False)


def eomt_masked() -> Example:
    return _eomt("Eomt", True)


def eomt_dinov3() -> Example:
    return _eomt("EomtDinov3", False, intermediate_size=64)


def eomt_dinov3_masked() -> Example:
    return _eomt("EomtDinov3", True, intermediate_size=64)


def rf_detr() -> Example:
    backbone = transformers.RfDetrDinov2Config(**TINY, image_size=128, patch_size=16, num_windows=2, out_indices=[2, 4])
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        **DECODER,
    )
    return Example(
        transformers.RfDetrForObjectDetection(config), lambda out: out.logits, [(3, 128, 128), (3, 192, 192)]
    )


def _lw_detr_vit() -> Any:
    return transformers.LwDetrViTConfig(
        **TINY,
        image_size=128,
        pretrain_image_size=128,
        patch_size=16,
        num_windows=4,
        window_block_indices=[0, 2],
        out_indices=[2, 4],
    )


def lw_detr_backbone() -> Example:
    host = transformers.LwDetrViTBackbone(_lw_detr_vit())
    return Example(host, _maps, [(3, 128, 128), (3, 128, 192)])


def lw_detr() -> Example:
    config = transformers.LwDetrConfig(
        backbone_config=_lw_detr_vit(),
        **DECODER,
        num_feature_levels=1,
        projector_scale_factors=[1.0],
    )
    return Example(transformers.LwDetrForObjectDetection(config), lambda out: out.logits, [(3, 128, 128)])


def vitpose() -> Example:
    backbone = transformers.VitPoseBackboneConfig(**TINY, image_size=[128, 96], patch_size=[16, 16], out_indices=[4])
    host = transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone, num_labels=3))
    return Example(host, lambda out: out.heatmaps, [(3, 128, 96)])


def _open_vocabulary(kind: str) -> Example:
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**SMALL, "image_size": 128, "patch_size": 16}, text_config=TEXT, projection_dim=32
    )
    host = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return Example(host, lambda out: torch.cat([out.pred_boxes, out.logits], -1), [(3, 128, 128)], WORDS)


def owlvit() -> Example:
    return _open_vocabulary("OwlViT")


def owlv2() -> Example:
    return _open_vocabulary("Owlv2")


def clipseg() -> Example:
    config = transformers.CLIPSegConfig(
        vision_config={**SMALL, "image_size": 128, "patch_size": 16},
        text_config=TEXT,
        extract_layers=[1, 2, 3],
        reduce_dim=16,
        projection_dim=32,
    )
    host = transformers.CLIPSegForImageSegmentation(config)
    return Example(host, lambda out: out.logits, [(3, 128, 128)], WORDS)


def upernet() -> Example:
    backbone = transformers.Dinov2Config(**TINY, image_size=112, patch_size=14, out_indices=[1, 2, 3, 4])
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=3, auxiliary_in_channels=32, pool_scales=[1, 2]
    )
    host = transformers.UperNetForSemanticSegmentation(config)
    return Example(host, lambda out: out.logits, [(3, 112, 112), (3, 112, 168)])


def mask2former() -> Example:
    backbone = transformers.Dinov2Config(**TINY, image_size=112, patch_size=14, out_indices=[1, 2, 3, 4])
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
    )
    host = transformers.Mask2FormerForUniversalSegmentation(config)
    return Example(host, lambda out: out.masks_queries_logits, [(3, 112, 112)])


def dinov3_backbone() -> Example:
    config = transformers.DINOv3ViTConfig(
        **TINY, intermediate_size=64, image_size=64, patch_size=8, num_register_tokens=2, out_indices=[2, 4]
    )
    host = transformers.DINOv3ViTBackbone(config)
    return Example(host, _maps, [(3, 64, 64), (3, 64, 96)])


def pixio_backbone() -> Example:
    config = transformers.PixioConfig(**TINY, image_size=64, patch_size=8, out_indices=[2, 4])
    host = transformers.PixioBackbone(config)
    return Example(host, _maps, [(3, 64, 64), (3, 64, 96)])


def _beit_config(kind: str, **options: Any) -> Any:
    return getattr(transformers, kind)(**SMALL, image_size=64, patch_size=8, use_relative_position_bias=True, **options)


def beit() -> Example:
    config = _beit_config("BeitConfig", num_labels=5)
    return Example(transformers.BeitForImageClassification(config), lambda out: out.logits, [(3, 64, 64)])


def beit_segmentation() -> Example:
    config = _beit_config("BeitConfig", num_labels=5, out_indices=[1, 2, 3, 4], pool_scales=[1, 2])
    return Example(transformers.BeitForSemanticSegmentation(config), lambda out: out.logits, [(3, 64, 64)])


def data2vec() -> Example:
    config = _beit_config("Data2VecVisionConfig", num_labels=5)
    return Example(transformers.Data2VecVisionForImageClassification(config), lambda out: out.logits, [(3, 64, 64)])


def video_mae() -> Example:
    config = transformers.VideoMAEConfig(**SMALL, image_size=64, patch_size=8, num_frames=4, num_labels=5)
    return Example(transformers.VideoMAEForVideoClassification(config), lambda out: out.logits, [(4, 3, 64, 64)])


def vjepa2() -> Example:
    config = transformers.VJEPA2Config(
        **TINY,
        mlp_ratio=2,
        crop_size=64,
        patch_size=8,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_labels=5,
    )
    host = transformers.VJEPA2ForVideoClassification(config)
    return Example(host, lambda out: out.logits, [(4, 3, 64, 64)], name="pixel_values_videos")


def vitdet() -> Example:
    config = transformers.VitDetConfig(
        **TINY,
        mlp_ratio=2,
        image_size=128,
        pretrain_image_size=64,
        patch_size=16,
        window_size=6,
        window_block_indices=[0, 2],
        residual_block_indices=[1],
        use_relative_position_embeddings=True,
        out_indices=[2, 4],
    )
    return Example(transformers.VitDetBackbone(config), _maps, [(3, 128, 128), (3, 128, 192)])


def _sam_vision() -> dict[str, Any]:
    sizes = {"mlp_dim": 48, "mlp_ratio": 1.5, "output_channels": 16, "num_pos_feats": 8}
    return {**TINY, **sizes, "image_size": 128, "patch_size": 16, "window_size": 6, "global_attn_indexes": [1, 3]}


def sam() -> Example:
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(**_sam_vision()),
        prompt_encoder_config={"hidden_size": 16, "image_size": 128, "patch_size": 16, "mask_input_channels": 8},
        mask_decoder_config={
            **{"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"iou_head_hidden_dim": 16, "attention_downsample_rate": 1},
        },
    )
    points: dict[str, Any] = {"input_points": torch.tensor([[[[40.0, 50.0]]]] * 2)}
    return Example(transformers.SamModel(config), lambda out: out.pred_masks, [(3, 128, 128)], points)


def sam_hq() -> Example:
    host = transformers.SamHQVisionModel(transformers.SamHQVisionConfig(**_sam_vision()))
    return Example(host, lambda out: torch.cat([out.last_hidden_state.flatten(1), *_flat(out)], 1), [(3, 128, 128)])


def _flat(output: Any) -> list[Tensor]:
    """What SAM-HQ taps behind its global layers."""
    return [part.flatten(1) for part in output.intermediate_embeddings]


def trocr() -> Example:
    decoder = transformers.TrOCRConfig(
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        vocab_size=50,
        cross_attention_hidden_size=32,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    encoder = transformers.ViTConfig(**SMALL, image_size=64, patch_size=8)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    host = transformers.VisionEncoderDecoderModel(config)
    host.config.decoder_start_token_id, host.config.pad_token_id = 2, 1
    words = {"decoder_input_ids": torch.tensor([[2, 5, 6]] * 2)}
    return Example(host, lambda out: out.logits, [(3, 64, 64)], words)


def vivit() -> Example:
    config = transformers.VivitConfig(**SMALL, image_size=64, num_frames=4, tubelet_size=[2, 8, 8], num_labels=5)
    return Example(transformers.VivitForVideoClassification(config), lambda out: out.logits, [(4, 3, 64, 64)])


def _tower(kind: str, module: str = "", **options: Any) -> Callable[[], Example]:
    def tower() -> Example:
        space = (
            transformers if not module else importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        )
        name = getattr(space, kind)
        config = name.config_class(**{**SMALL, "image_size": 64, "patch_size": 8, **options})
        return Example(name(config), lambda out: out.last_hidden_state, [(3, 64, 64)])

    return tower


TOWERS = {
    "internvl": _tower("InternVLVisionModel", image_size=[64, 64], patch_size=[8, 8]),
    "metaclip_2": _tower("MetaClip2VisionModel"),
    "mlcd": _tower("MLCDVisionModel"),
    "chinese_clip": _tower("ChineseCLIPVisionModel"),
    "altclip": _tower("AltCLIPVisionModel"),
    "vit_msn": _tower("ViTMSNModel"),
    "ijepa": _tower("IJepaModel"),
    "pixio": _tower("PixioModel"),
    "aimv2": _tower("Aimv2VisionModel"),
    "tipsv2": _tower("Tipsv2VisionModel"),
    "blip_2": _tower("Blip2VisionModel"),
    "instructblip": _tower("InstructBlipVisionModel"),
    "kosmos2": _tower("Kosmos2VisionModel", "kosmos2"),
    "sapiens2": _tower("Sapiens2Model"),
    "owlvit_tower": _tower("OwlViTVisionModel"),
}
HOSTS: dict[str, Callable[[], Example]] = {
    function.__name__: function
    for function in (
        *(depth_anything, depth_anything_registers, prompt_depth_anything, dpt, dpt_on_dinov2, zoedepth),
        *(eomt, eomt_masked, eomt_dinov3, eomt_dinov3_masked, rf_detr, lw_detr, lw_detr_backbone, vitpose),
        *(owlvit, owlv2, clipseg, upernet, mask2former, dinov3_backbone, pixio_backbone),
        *(beit, beit_segmentation, data2vec, video_mae, vjepa2, vivit, trocr, vitdet, sam, sam_hq),
    )
} | TOWERS
"""A function that makes each host, by name."""


def make(name: str, std: float = 0.1) -> Example:
    """A host with random weights, none of them zero."""
    torch.manual_seed(0)
    example = HOSTS[name]()
    example.host.eval()
    for parameter in example.host.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
    return example
