"""Dense tasks: adaptive models as backbones, and detectors and segmenters with heads of torchvision and transformers.

model = aptvit.adapt(vit, keep=0.7, window_size=16, global_blocks=[2, 5, 8, 11], pad=True)
detector = aptvit.dense.make_detector(model, num_classes=80)
segmenter = aptvit.dense.make_segmenter(model, num_classes=150, indices=[3, 5, 7, 11])

May import `aptvit.api` and all below it.
"""

from aptvit.datasets.find_boxes import find_boxes
from aptvit.datasets.find_masks import find_masks
from aptvit.dense.backbone import DetectionBackbone, TransformersBackbone
from aptvit.dense.content import content_keep_ratio
from aptvit.dense.detail import CellDetail
from aptvit.dense.detector import make_detector
from aptvit.dense.pyramid import DepthPyramid, SimplePyramid
from aptvit.dense.saved import DenseModel, from_pretrained
from aptvit.dense.segmenter import Segmenter, make_segmenter

__all__ = [
    "CellDetail",
    "DenseModel",
    "DepthPyramid",
    "DetectionBackbone",
    "Segmenter",
    "SimplePyramid",
    "TransformersBackbone",
    "content_keep_ratio",
    "find_boxes",
    "find_masks",
    "from_pretrained",
    "make_detector",
    "make_segmenter",
]
