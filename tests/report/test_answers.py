"""Answers of models are those that transformers' own processors make of the same outputs, and likeness is numpy's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torchvision.ops import box_iou
from transformers.modeling_outputs import BaseModelOutput, DepthEstimatorOutput, SemanticSegmenterOutput

from aptvit.report.answers import BoxAnswer, ImageAnswer, MapAnswer, PointAnswer, RegionAnswer, answers_of, drawings_of

IMAGE = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def boxes(count: int, seed: int = 0) -> Tensor:
    """(2, count, 4) centres and sizes."""
    centre, size = torch.rand(2, 2, count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([0.3 + 0.4 * centre, 0.1 + 0.4 * size], -1)


def test_boxes_are_those_of_the_processor() -> None:
    output = SimpleNamespace(logits=randn(2, 20, 5) - 1, pred_boxes=boxes(20))
    expected = transformers.DeformableDetrImageProcessor().post_process_object_detection(output, 0.3)
    for answer, of_image in zip(answers_of(output), expected, strict=True):
        assert isinstance(answer, BoxAnswer) and len(answer.boxes) == len(of_image["boxes"]) > 3
        torch.testing.assert_close(answer.boxes, of_image["boxes"].clamp(0, 1))
        assert answer.classes.tolist() == of_image["labels"].tolist()
        torch.testing.assert_close(answer.scores, of_image["scores"])


def test_boxes_of_open_vocabulary_are_those_of_the_processor() -> None:
    output = SimpleNamespace(logits=randn(2, 20, 3), pred_boxes=boxes(20), image_embeds=randn(2, 4, 5, 8))
    expected = transformers.OwlViTImageProcessor().post_process_object_detection(output, 0.3)
    for answer, of_image in zip(answers_of(output), expected, strict=True):
        assert isinstance(answer, BoxAnswer)
        order = of_image["scores"].argsort(descending=True)
        torch.testing.assert_close(answer.boxes, of_image["boxes"][order].clamp(0, 1))
        assert answer.classes.tolist() == of_image["labels"][order].tolist()


def test_regions_of_queries_are_those_of_the_processor() -> None:
    output = SimpleNamespace(class_queries_logits=3 * randn(2, 6, 4), masks_queries_logits=4 * randn(2, 6, 8, 12))
    processor = transformers.Mask2FormerImageProcessor()
    expected = processor.post_process_semantic_segmentation(output, [(384, 384)] * 2)
    for answer, of_image in zip(answers_of(output), expected, strict=True):
        assert isinstance(answer, RegionAnswer)
        # The processor enlarges masks before it chooses: cells whose class is clear all around are equal.
        enlarged = F.interpolate(answer.classes[None, None].float(), size=(384, 384))[0, 0]
        assert (enlarged == of_image).float().mean() > 0.75 and len(answer.classes.unique()) > 1


def test_regions_of_logits_are_those_of_the_processor() -> None:
    output = SemanticSegmenterOutput(logits=randn(2, 5, 8, 12))
    expected = transformers.SegformerImageProcessor().post_process_semantic_segmentation(output)
    for answer, of_image in zip(answers_of(output), expected, strict=True):
        assert isinstance(answer, RegionAnswer) and answer.classes.tolist() == of_image.tolist()


def test_points_are_those_of_the_processor() -> None:
    heatmaps = F.interpolate(randn(2, 3, 8, 6), size=(64, 48), mode="bicubic")
    output = SimpleNamespace(heatmaps=heatmaps)
    processor = transformers.VitPoseImageProcessor(size={"height": 256, "width": 192})
    whole = [[[0.0, 0.0, 192.0, 256.0]]] * 2
    expected = processor.post_process_pose_estimation(output, boxes=whole, threshold=-10)
    for answer, (person,) in zip(answers_of(output), expected, strict=True):
        assert isinstance(answer, PointAnswer)
        # The processor's box has a margin of a quarter around it.
        inside = (person["keypoints"] / torch.tensor([192.0, 256.0]) - 0.5) / 1.25 + 0.5
        assert (answer.points - inside).abs().max() < 0.03


def test_depth_maps_and_prompted_masks_are_maps() -> None:
    depth = randn(2, 8, 12)
    for values, output in (
        (depth, DepthEstimatorOutput(predicted_depth=depth)),
        (depth.sigmoid(), SimpleNamespace(logits=depth)),
        (depth, depth),
    ):
        first, second = answers_of(output)
        assert isinstance(first, MapAnswer) and isinstance(second, MapAnswer)
        assert torch.equal(first.values, values[0])
        expected = np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]
        assert first.likeness(second) == pytest.approx(expected, abs=1e-5) and first.likeness(first) == pytest.approx(1)


@pytest.mark.parametrize(
    "output", [randn(2, 7), BaseModelOutput(last_hidden_state=randn(2, 3, 4)), SimpleNamespace(logits=randn(2, 9))]
)
def test_other_outputs_are_numbers(output: Any) -> None:
    tensor = output if isinstance(output, Tensor) else next(iter(vars(output).values()))
    for i, answer in enumerate(answers_of(output)):
        assert type(answer) is ImageAnswer and torch.equal(answer.numbers, tensor[i].flatten())
        assert answer.likeness(answer) is None and drawings_of(IMAGE, answer, answer) is None


def test_an_output_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no field that can be compared"):
        answers_of(SimpleNamespace(loss=None))


def box_answer(corners: Tensor, classes: list[int]) -> BoxAnswer:
    scores = torch.linspace(0.9, 0.5, len(classes))
    return BoxAnswer(corners.flatten(), corners, torch.tensor(classes), scores, ["cat", "dog"])


def test_likeness_of_boxes_is_f1() -> None:
    corners = torch.tensor([[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.1, 0.6, 0.3, 0.9]])
    uniform = box_answer(corners, [0, 1, 0])
    moved = box_answer(torch.cat([corners[:2] + 0.03, corners[:1] + 0.03]), [0, 0, 0])
    # The first is found again; the second has another class; the third is the first once more.
    assert box_iou(corners[:1], corners[:1] + 0.03)[0, 0] > 0.5
    assert moved.likeness(uniform) == pytest.approx(2 * 1 / 6)
    assert uniform.likeness(uniform) == 1 and box_answer(corners[:0], []).likeness(box_answer(corners[:0], [])) == 1


def test_likeness_of_regions_and_points() -> None:
    classes = torch.arange(12).view(3, 4)
    other = classes.clone()
    other[0] = 99
    assert RegionAnswer(randn(1), other).likeness(RegionAnswer(randn(1), classes)) == pytest.approx(8 / 12)
    points = torch.tensor([[0.2, 0.3], [0.5, 0.5]])
    moved = points + torch.tensor([[0.03, 0.0], [0.0, 0.2]])
    assert PointAnswer(randn(1), moved).likeness(PointAnswer(randn(1), points)) == 0.5


def test_drawings_show_what_differs() -> None:
    """Nothing is drawn in the colours of differences where answers are the same."""
    corners = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]])
    pairs: list[tuple[Any, Any]] = [
        (box_answer(corners, [0, 1]), box_answer(corners[:1], [0])),
        (RegionAnswer(randn(1), torch.zeros(4, 6).long()), RegionAnswer(randn(1), torch.eye(4, 6).long())),
        (MapAnswer(randn(1), randn(4, 6)), MapAnswer(randn(1), randn(4, 6, seed=1))),
        (PointAnswer(randn(1), corners[:, :2]), PointAnswer(randn(1), corners[:, 2:])),
    ]
    for uniform, adaptive in pairs:
        drawings, same = drawings_of(IMAGE, uniform, adaptive), drawings_of(IMAGE, uniform, uniform)
        assert drawings is not None and same is not None
        drawn = [np.asarray(getattr(drawings, name)) for name in ("uniform", "adaptive", "difference")]
        assert all(picture.shape == IMAGE.shape and picture.dtype == np.uint8 for picture in drawn)
        assert (drawn[0] != drawn[1]).any() and (drawn[2] != np.asarray(same.difference)).any()
        assert np.array_equal(np.asarray(same.uniform), np.asarray(same.adaptive))
