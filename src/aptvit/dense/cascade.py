"""Cascade R-CNN's heads: each stage refines the boxes of the previous stage, with a greater overlap for matches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import box_iou, clip_boxes_to_image

__all__ = ["CascadePredictor", "CascadeRoIHeads"]

_OVERLAPS = (0.5, 0.6, 0.7)
_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))

Stage = tuple[list[Tensor], list[Tensor], list[Tensor]]  # proposals, indices of matched boxes, classes, for each image


class CascadePredictor(nn.Module):
    """Predicts classes, and a box that does not depend on the class.

    Args:
        width: Width of the input.
        num_classes: Number of classes, background included.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes)
        self.bbox_pred = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, width) -> (n, classes) logits, (n, 4) offsets."""
        return self.cls_score(x), self.bbox_pred(x)


class CascadeRoIHeads(RoIHeads):
    """torchvision's RoI heads with three stages of boxes; masks are trained on the first stage's proposals.

    Args:
        heads: torchvision's RoI heads, whose settings, pooling and mask head are used.
        box_heads: The box head of each stage.
        predictors: The predictor of each stage.
    """

    def __init__(self, heads: RoIHeads, box_heads: Sequence[nn.Module], predictors: Sequence[nn.Module]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(heads).items() if not name.startswith("_")})
        self.box_similarity, self.fg_bg_sampler = box_iou, heads.fg_bg_sampler
        for name in ("box_roi_pool", "mask_roi_pool", "mask_head", "mask_predictor"):
            setattr(self, name, getattr(heads, name))
        for name in ("keypoint_roi_pool", "keypoint_head", "keypoint_predictor"):
            setattr(self, name, None)
        self.box_heads, self.predictors = nn.ModuleList(box_heads), nn.ModuleList(predictors)
        self.coders = [BoxCoder(weights) for weights in _WEIGHTS]
        self.matchers = [Matcher(overlap, overlap, allow_low_quality_matches=False) for overlap in _OVERLAPS]
        self.box_coder, self.proposal_matcher = self.coders[0], self.matchers[0]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's RoI heads. In training the losses of the stages are added."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        first = (proposals, matched, labels)
        losses = {"loss_classifier": torch.zeros((), device=proposals[0].device)}
        losses["loss_box_reg"] = losses["loss_classifier"].clone()
        stage: Stage = first
        for number in range(len(self.box_heads)):
            logits, offsets = self._stage(number, features, stage[0], image_shapes)
            classifier, boxes = self._losses(number, logits, offsets, stage, targets)
            losses["loss_classifier"] = losses["loss_classifier"] + classifier
            losses["loss_box_reg"] = losses["loss_box_reg"] + boxes
            if number + 1 < len(self.box_heads):
                refined = self._refined(number, offsets.detach(), stage[0], image_shapes)
                stage = self._matched(number + 1, refined, targets)
        if self.has_mask():
            losses |= self._mask_loss(features, first, image_shapes, targets)
        return [], losses

    def _stage(
        self, number: int, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        return self.predictors[number](self.box_heads[number](pooled))

    def _refined(
        self, number: int, offsets: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """The boxes of a stage, clipped to their images."""
        boxes = (
            self.coders[number]
            .decode(offsets, proposals)[:, 0]
            .split([len(boxes_of_image) for boxes_of_image in proposals])
        )
        return [
            clip_boxes_to_image(boxes_of_image, shape)
            for boxes_of_image, shape in zip(boxes, image_shapes, strict=True)
        ]

    def _matched(self, number: int, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> Stage:
        """Match proposals with target boxes at the overlap of a stage; the class of empty proposals is -1."""
        matched, labels = [], []
        for candidates, target in zip(proposals, targets, strict=True):
            label = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
            nearest = label.clone()
            if len(target["boxes"]):
                overlaps = box_iou(target["boxes"].to(candidates.dtype), candidates)
                indices = self.matchers[number](overlaps)  # negative: background
                nearest = indices.clamp(min=0)
                label = torch.where(indices >= 0, target["labels"][nearest], label)
            label[(candidates[:, 2:] - candidates[:, :2] <= 0).any(1)] = -1
            matched.append(nearest)
            labels.append(label)
        return proposals, matched, labels

    def _losses(
        self, number: int, logits: Tensor, offsets: Tensor, stage: Stage, targets: list[dict[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        proposals, matched, labels = stage
        label = torch.cat(labels)
        classifier = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") / (label >= 0).sum().clamp(min=1)
        matched_boxes = []
        for candidates, index, target in zip(proposals, matched, targets, strict=True):
            boxes = target["boxes"].to(candidates.dtype)
            matched_boxes.append(boxes[index] if len(boxes) else torch.zeros_like(candidates))
        positive = label > 0
        # Encoding takes the logarithm of a ratio of sides, which empty proposals do not have.
        expected = self.coders[number].encode_single(torch.cat(matched_boxes)[positive], torch.cat(proposals)[positive])
        distance = F.smooth_l1_loss(offsets[positive], expected, beta=1 / 9, reduction="sum")
        return classifier, distance / max(len(label), 1)

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        stage: Stage,
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        proposals, matched, labels = stage
        chosen = [values > 0 for values in labels]
        boxes = [values[pick] for values, pick in zip(proposals, chosen, strict=True)]
        index = [values[pick] for values, pick in zip(matched, chosen, strict=True)]
        logits = self._mask_logits(features, boxes, image_shapes)
        masks, classes = [target["masks"] for target in targets], [target["labels"] for target in targets]
        return {"loss_mask": maskrcnn_loss(logits, boxes, masks, classes, index)}

    def _mask_logits(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Any:
        pool: Any = self.mask_roi_pool
        head: Any = self.mask_head
        predictor: Any = self.mask_predictor
        return predictor(head(pool(features, boxes, image_shapes)))

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes of the last stage with the mean scores of all stages."""
        scores: list[Tensor] = []
        for number in range(len(self.box_heads)):
            logits, offsets = self._stage(number, features, proposals, image_shapes)
            scores.append(logits.softmax(-1))
            proposals = self._refined(number, offsets, proposals, image_shapes)
        mean = torch.stack(scores).mean(0)
        # postprocess_detections decodes offsets for each class, which are zero for the refined boxes.
        no_offsets = mean.new_zeros(len(mean), mean.shape[1] * 4)
        detected = self.postprocess_detections(mean.clamp(min=1e-12).log(), no_offsets, proposals, image_shapes)
        result = [{"boxes": b, "labels": c, "scores": s} for b, s, c in zip(*detected, strict=True)]
        if self.has_mask():
            logits = self._mask_logits(features, [detections["boxes"] for detections in result], image_shapes)
            masks = maskrcnn_inference(logits, [detections["labels"] for detections in result])
            for detections, mask in zip(result, masks, strict=True):
                detections["masks"] = mask
        return result
