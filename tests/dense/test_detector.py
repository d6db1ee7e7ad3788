from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aptvit.dense import make_detector


@pytest.fixture
def scenes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Three pictures of different sizes: two boxes, one, and none."""
    images = [torch.rand(3, 100, 128) * 0.1, torch.rand(3, 128, 90) * 0.1, torch.rand(3, 64, 64) * 0.1]
    boxes = [[[10.0, 10, 60, 60], [70, 20, 120, 90]], [[20.0, 40, 70, 100]], []]
    targets = []
    for image, its in zip(images, boxes, strict=True):
        masks = torch.zeros(len(its), *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, its, strict=True):
            image[:, int(y1) : int(y2), int(x1) : int(x2)] += 0.8
            mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
        result = torch.tensor(its).reshape(-1, 4)
        targets.append({"boxes": result, "labels": torch.ones(len(its), dtype=torch.int64), "masks": masks})
    return images, targets


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("windowed, cascade", [(False, False), (True, False), (True, True)])
def test_it_trains_and_answers_as_torchvision_s_do(
    make_model: Callable[..., Any], scenes: tuple, masks: bool, windowed: bool, cascade: bool
) -> None:
    images, targets = scenes
    model = make_model(windowed, thresholds=(6.5, 5.5))
    detector = make_detector(model, 2, masks, cascade, image_size=128, out_channels=32)
    losses = detector(images, targets)
    assert ("loss_mask" in losses) == masks
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert model.coarse_embed.linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        result = detector.eval()(images)
    assert len(result) == 3
    for image, its in zip(images, result, strict=True):
        assert its["boxes"].shape[1] == 4 and its["boxes"].isfinite().all()
        assert its["boxes"].numel() == 0 or its["boxes"][:, 2].max() <= image.shape[2]


def test_images_reach_the_backbone_as_its_host_wants_them(make_model: Callable[..., Any], scenes: tuple) -> None:
    model = make_model(thresholds=(6.5, 5.5))
    detector = make_detector(model, num_classes=2, image_size=128, out_channels=32).eval()
    received: list[Tensor] = []
    detector.backbone.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    with torch.no_grad():
        detector(scenes[0])
    assert received[0].shape == (3, 3, 128, 128)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.patchifier.mean, model.patchifier.std))
    expected = (scenes[0][0] - mean) / std
    torch.testing.assert_close(received[0][0, :, :100], expected, rtol=1e-4, atol=1e-4)
    assert (received[0][0, :, 100:] == 0).all()  # filled up


@pytest.mark.parametrize("cascade", [False, True])
def test_channels_last_changes_nothing_but_time(make_model: Callable[..., Any], scenes: tuple, cascade: bool) -> None:
    options: dict[str, Any] = {"image_size": 128, "out_channels": 32, "box_score_thresh": 0.0, "rpn_score_thresh": 0.0}
    detector = make_detector(make_model(True, thresholds=(6.5, 5.5)), 2, True, cascade, **options).eval()
    plain = copy.deepcopy(detector).to(memory_format=torch.contiguous_format)
    for part in (detector.backbone.neck, detector.rpn, detector.roi_heads):
        filters = [one for one in part.parameters() if one.ndim == 4]
        assert filters and all(one.is_contiguous(memory_format=torch.channels_last) for one in filters)
    with torch.no_grad():
        got, expected = detector(scenes[0]), plain(scenes[0])
    assert all(len(its["boxes"]) for its in expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cascade", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_in_parts_it_finds_the_same(make_model: Callable[..., Any], scenes: tuple, cascade: bool) -> None:
    torch.compiler.reset()
    options: dict[str, Any] = {"image_size": 128, "out_channels": 32, "box_score_thresh": 0.0, "rpn_score_thresh": 0.0}
    detector = make_detector(make_model(True, thresholds=(6.5, 5.5)), 2, True, cascade, **options).eval()
    graphs: list[torch.nn.Module] = []

    def seen(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        before = [detector(images) for images in (scenes[0], scenes[0][:1])]
        detector.compile(backend=seen, fullgraph=True)
        after = [detector(images) for images in (scenes[0], scenes[0][:1])]
    assert all(len(its["boxes"]) for its in before[0])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    called = {getattr(node.target, "__name__", "") for graph in graphs for node in graph.graph.nodes}
    assert {"conv_transpose2d", "linear", "packed_attention"} <= called  # of neck and masks, boxes, blocks
    torch.compiler.reset()


def test_a_cascade_of_one_stage_is_torchvision_s(make_model: Callable[..., Any], scenes: tuple) -> None:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    from aptvit.dense.cascade import CascadePredictor, CascadeRoIHeads

    images, targets = scenes
    detector = make_detector(make_model(thresholds=(-1.0,)), num_classes=2, image_size=128, out_channels=32)
    own = detector.roi_heads
    own.box_predictor = FastRCNNPredictor(1024, 3)
    with torch.no_grad():  # the same box for each class, as the cascade has it
        own.box_predictor.bbox_pred.weight.copy_(own.box_predictor.bbox_pred.weight[:4].repeat(3, 1))
        own.box_predictor.bbox_pred.bias.copy_(own.box_predictor.bbox_pred.bias[:4].repeat(3))
    predictor = CascadePredictor(1024, 3)
    predictor.cls_score = own.box_predictor.cls_score
    predictor.bbox_pred.weight.data = own.box_predictor.bbox_pred.weight.data[:4]
    predictor.bbox_pred.bias.data = own.box_predictor.bbox_pred.bias.data[:4]
    cascade = CascadeRoIHeads(own, [own.box_head], [predictor])
    answers = []
    for heads in (own, cascade):
        detector.roi_heads = heads
        torch.manual_seed(0)
        losses = detector.train()(images, targets)
        with torch.no_grad():
            answers.append((losses, detector.eval()(images)))
    for name, loss in answers[0][0].items():
        torch.testing.assert_close(answers[1][0][name], loss)
    for expected, actual in zip(answers[0][1], answers[1][1], strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-3)


def test_no_box_and_broken_boxes(make_model: Callable[..., Any], scenes: tuple) -> None:
    images, targets = scenes
    detector = make_detector(make_model(thresholds=(6.5,)), num_classes=2, image_size=128, out_channels=32)
    losses = detector(images[2:], targets[2:])
    assert sum(losses.values()).isfinite()
    cascade = make_detector(make_model(thresholds=(6.5,)), 2, cascade=True, image_size=128, out_channels=32)
    total = sum(cascade(images[2:], targets[2:]).values())
    total.backward()
    assert total.isfinite() and all(p.grad.isfinite().all() for p in cascade.parameters() if p.grad is not None)
    broken = [{**targets[0], "boxes": torch.tensor([[10.0, 10, 10, 60], [70, 20, 120, 90]])}]
    with pytest.raises(AssertionError, match="positive height and width"):
        detector(images[:1], broken)
    with pytest.raises(ValueError, match="at least one class"):
        make_detector(make_model(), num_classes=0)
