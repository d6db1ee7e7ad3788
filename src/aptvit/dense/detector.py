"""ViTDet on adaptive patches: torchvision's Faster or Mask R-CNN behind a simple feature pyramid."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from aptvit.dense.backbone import DetectionBackbone
from aptvit.dense.cascade import CascadePredictor, CascadeRoIHeads
from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["make_detector"]


def make_detector(
    model: AdaptivePatchTransformer,
    num_classes: int,
    masks: bool = False,
    cascade: bool = False,
    image_size: int = 1024,
    out_channels: int = 256,
    detail: bool = True,
    **options: Any,
) -> FasterRCNN:
    """A detector on an adaptive model.

    As all detectors of torchvision it takes lists of (3, H, W) images in 0..1, and targets in training. Images are
    resized, normalised as the model's host expects, and padded at the right and bottom to whole patches or windows.

    Args:
        model: The backbone.
        num_classes: Number of classes, without the background.
        masks: Predict a mask for each box.
        cascade: Three stages of boxes (Cascade R-CNN) instead of one.
        image_size: The longer side of images is resized to this many pixels.
        out_channels: Channels of the pyramid's levels and of the heads.
        detail: Refine the map where patches are coarse, see `CellDetail`.
        options: As for torchvision's ``FasterRCNN`` and ``MaskRCNN``.

    Returns:
        The detector: in evaluation for each image ``boxes`` (n, 4), ``labels`` (n,), ``scores`` (n,) and, with masks,
        ``masks`` (n, 1, H, W); in training the losses.

    Raises:
        ValueError: If there are no classes.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: a detector needs at least one class besides the background")
    backbone = DetectionBackbone(model, out_channels, detail)
    defaults: dict[str, Any] = {
        "min_size": image_size,
        "max_size": image_size,
        "image_mean": list(model.patchifier.mean),
        "image_std": list(model.patchifier.std),
        "size_divisible": backbone.stride,
        "rpn_head": RPNHead(out_channels, num_anchors=3, conv_depth=2),
        "box_head": _box_head(out_channels),
        "box_predictor": FastRCNNPredictor(_WIDTH, num_classes + 1),  # the first class is the background
    }
    if masks:
        defaults["mask_head"] = MaskRCNNHeads(out_channels, [out_channels] * 4, dilation=1, norm_layer=LayerNorm2d)
        defaults["mask_predictor"] = MaskRCNNPredictor(out_channels, out_channels, num_classes + 1)
    detector = (_MaskRCNN if masks else _FasterRCNN)(backbone, **{**defaults, **options})
    if cascade:
        heads = [_box_head(out_channels) for _ in range(3)]
        predictors = [CascadePredictor(_WIDTH, num_classes + 1) for _ in range(3)]
        detector.roi_heads = CascadeRoIHeads(detector.roi_heads, heads, predictors)
    for part in (backbone.neck, detector.rpn, detector.roi_heads):
        part.to(memory_format=torch.channels_last)  # as convolutions of CPUs and tensor cores want it
    for module in detector.modules():
        if isinstance(module, (RPNHead, FastRCNNPredictor, CascadePredictor, MaskRCNNPredictor)):
            module.register_forward_hook(_in_float)
    return detector


class _CompiledInParts:
    """Compiles the networks in a detector separately, since the number of boxes differs from image to image."""

    backbone: nn.Module
    rpn: Any
    roi_heads: Any

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile blocks, neck and heads, each by itself; takes the arguments of ``torch.compile``."""
        networks = (RPNHead, FastRCNNConvFCHead, MaskRCNNHeads, MaskRCNNPredictor)
        heads = [module for module in (*self.rpn.modules(), *self.roi_heads.modules()) if isinstance(module, networks)]
        for part in (self.backbone, *heads):
            part.compile(*args, **kwargs)


class _FasterRCNN(_CompiledInParts, FasterRCNN):
    pass


class _MaskRCNN(_CompiledInParts, MaskRCNN):
    pass


def _in_float(_module: nn.Module, _arguments: Any, outputs: Any) -> Any:
    """Hook that casts outputs to float32: half precision would round the corners of boxes to several pixels."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float(_module, None, output) for output in outputs)


_WIDTH = 1024


def _box_head(channels: int) -> FastRCNNConvFCHead:
    return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [_WIDTH], norm_layer=LayerNorm2d)
