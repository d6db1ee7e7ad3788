"""What must hold after the statements of the pages windows.md, dense-models.md and train-dense.md of docs/how-to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from snippets.checks import (
    Page,
    after,
    are_maps,
    as_read,
    attends_in_windows,
    close,
    is_cut_by_thresholds,
    is_the_host_with_nothing_merged,
    is_upernet,
    keeps_of_each_image,
    reaches_all_of,
    uniform,
)

import aptvit


@after("model = aptvit.adapt(vit, thresholds=(5.5, 4.0), window_size=32, global_blocks=[1, 3, 5, 7, 9, 11], pad=True)")
def _(page: Page) -> None:
    is_cut_by_thresholds(page.model, page.images, (5.5, 4.0))
    attends_in_windows(page.model, page.images, 4, [1, 3, 5, 7, 9, 11])


@after("maps = model.forward_intermediates(images, indices=[3, 5, 7, 11], intermediates_only=True)")
def _(page: Page) -> None:
    are_maps(page.model, page.images, page.maps, [3, 5, 7, 11])


@after("model = aptvit.adapt(vit, scorer='spread', keep=0.5, area_bias=0.5)")
@torch.no_grad()
def _(page: Page) -> None:
    """A token of twice the side counts twice, so one image token more of the same makes no difference to others."""
    is_the_host_with_nothing_merged(page.model, page.vit, page.batch)
    merged = aptvit.adapt(page.vit, thresholds=1e9).layout(page.batch)
    found, plain = page.model(page.batch, layout=merged), aptvit.adapt(page.vit, thresholds=1e9)(page.batch)
    assert (found - plain).abs().max() > 1e-4 * plain.abs().max()


@after("model.area_bias = 0.0")
@torch.no_grad()
def _(page: Page) -> None:
    merged = aptvit.adapt(page.vit, thresholds=1e9)
    close(page.model(page.batch, layout=merged.layout(page.batch)), merged(page.batch))


@after("model = aptvit.adapt(vit, keep=0.7, window_size=16, global_blocks=[2, 5, 8, 11], pad=True)")
def _(page: Page) -> None:
    keeps_of_each_image(page.model.layout(page.images), 0.7)
    attends_in_windows(page.model, page.images, 4, [2, 5, 8, 11])


@after("detector = aptvit.dense.make_detector(model, num_classes=80)")
@torch.no_grad()
def _(page: Page) -> None:
    from torchvision.models.detection import FasterRCNN

    assert isinstance(page.detector, FasterRCNN)
    assert page.detector.roi_heads.box_predictor.cls_score.out_features == 81  # and the background
    x = as_read(page.model, page.images)
    (last,) = page.model.forward_intermediates(x, 1, intermediates_only=True, layout=uniform(page.model, x))
    levels = page.detector.backbone(x, uniform(page.model, x))
    assert [level.shape[-1] for level in levels.values()] == [32, 16, 8, 4, 2]
    close(levels["2"], page.detector.backbone.neck(last)["2"])


@after("detector = aptvit.dense.make_detector(model, num_classes=80, masks=True, image_size=1536)")
def _(page: Page) -> None:
    from torchvision.models.detection import MaskRCNN

    assert isinstance(page.detector, MaskRCNN)
    assert page.detector.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 81


@after("losses = detector(images, targets)")
def _(page: Page) -> None:
    """A small step against the gradient makes them smaller, and the backbone has a part in it."""
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", "loss_mask"}
    assert set(page.losses) == names
    detector = copy.deepcopy(page.detector)
    totals = []
    for step in (True, False):
        torch.manual_seed(0)  # boxes are drawn
        total = sum(detector(page.images, page.targets).values())
        totals.append(float(total.detach()))
        if step:
            total.backward()
            assert reaches_all_of(detector.backbone.model.adapter.blocks[0])
            squares = sum(float(p.grad.square().sum()) for p in detector.parameters() if p.grad is not None)
            with torch.no_grad():
                for parameter in detector.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * totals[0] / squares * parameter.grad
    assert totals[1] < totals[0] * 0.99


@after("found = detector.eval()(images)")
@torch.no_grad()
def _(page: Page) -> None:
    """An untrained detector is sure of nothing, so boxes of any score are looked at as well."""
    least = page.detector.roi_heads.score_thresh
    page.detector.roi_heads.score_thresh = 0.0
    for image, sure, found in zip(page.images, page.found, page.detector(page.images), strict=True):
        assert set(sure) == set(found) == {"boxes", "labels", "scores", "masks"}
        assert len(sure["boxes"]) == (found["scores"] > least).sum() and len(found["boxes"]) > 0
        (alone,) = page.detector([image])
        for name, values in found.items():
            torch.testing.assert_close(values, alone[name], rtol=1e-3, atol=1e-3)
        assert found["masks"].shape[1:] == (1, 128, 128)
        assert set(found["labels"].tolist()) <= set(range(1, 81))
        assert (found["scores"].diff() <= 0).all()
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        assert ((x1 >= 0) & (x1 <= x2) & (x2 <= 128) & (y1 >= 0) & (y1 <= y2) & (y2 <= 128)).all()
    page.detector.roi_heads.score_thresh = least


@after("segmenter = aptvit.dense.make_segmenter(model, num_classes=150)")
def _(page: Page) -> None:
    is_upernet(page.segmenter, page.model, page.images, 150, [2, 5, 8, 11])


@after("segmenter = aptvit.dense.make_segmenter(model, num_classes=150, indices=[3, 5, 7, 11])")
def _(page: Page) -> None:
    is_upernet(page.segmenter, page.model, page.batch, 150, [3, 5, 7, 11])


@after("loss = segmenter.loss(batch, labels)")
def _(page: Page) -> None:
    """Cross-entropy, and 0.4 times that of the auxiliary head, by the probability of each pixel's own class."""
    segmenter = copy.deepcopy(page.segmenter)
    with torch.no_grad():
        levels = segmenter.backbone.feature_maps(page.batch)
        expected = 0.0
        for head, weight in ((segmenter.head, 1.0), (segmenter.auxiliary, 0.4)):
            logits = F.interpolate(head(levels), size=(128, 128), mode="bilinear")
            own = logits.double().softmax(1).gather(1, page.labels[:, None])
            expected -= weight * float(own.log().mean())
    assert page.loss.item() == pytest.approx(expected, rel=1e-4)
    page.loss.backward()
    assert reaches_all_of(page.model.adapter.blocks[0])


@after("probabilities = segmenter.eval().predict(image, mode='slide', crop=512)")
@torch.no_grad()
def _(page: Page) -> None:
    close(page.probabilities, page.segmenter(page.image[None])[0].softmax(0))  # one crop holds all of it
    close(page.probabilities.sum(0), torch.ones(128, 128))


@after(
    "upernet.backbone = aptvit.dense.TransformersBackbone(model, [3, 5, 7, 11], neck=aptvit.dense.DepthPyramid(768))"
)
@torch.no_grad()
def _(page: Page) -> None:
    backbone = page.upernet.backbone
    maps = page.model.forward_intermediates(page.batch, [3, 5, 7, 11], intermediates_only=True)
    found = backbone(page.batch).feature_maps
    assert [level.shape[-1] for level in found] == [32, 16, 8, 4] and backbone.channels == [64] * 4
    close(found[2], maps[2])
    close(found[3], F.max_pool2d(maps[3], 2))


@after("dpt.backbone = aptvit.dense.TransformersBackbone(dinov2, [2, 5, 8, 11], norm=True, sequence=True)")
@torch.no_grad()
def _(page: Page) -> None:
    x = page.batch[:, :, :112, :112]
    found = page.dpt.backbone(x).feature_maps
    pairs = page.dinov2.forward_intermediates(
        x, [2, 5, 8, 11], norm=True, return_prefix_tokens=True, intermediates_only=True
    )
    for rows, (maps, prefix) in zip(found, pairs, strict=True):
        close(rows[:, 0], prefix[:, 0])
        close(rows[:, 1:], maps.flatten(2).transpose(1, 2))


@after("adaptive = aptvit.adapt(vit, scorer='spread', keep=0.5)")
def _(page: Page) -> None:
    is_the_host_with_nothing_merged(page.adaptive, page.vit, page.batch)
    with pytest.raises(ValueError, match=r"not trained yet: call aptvit\.fit_spread\("):
        page.adaptive.layout(page.batch)


@after("aptvit.fit_spread(adaptive, images, lambda images: segmenter(images).softmax(1))")
@torch.no_grad()
def _(page: Page) -> None:
    layout = page.adaptive.layout(page.batch)
    keeps_of_each_image(layout, 0.5)
    ((_, scores),) = page.adaptive.scores(page.batch)
    for image in range(2):
        least = scores[2][image].flatten().argsort()[:11]
        merged = layout.scale_map[image, ::2, ::2].flatten().nonzero()[:, 0]
        assert sorted(merged.tolist()) == sorted(least.tolist())


@after("adaptive = aptvit.adapt(vit, scorer='preview', keep=0.59)")
@torch.no_grad()
def _(page: Page) -> None:
    layout = page.adaptive.layout(page.batch)
    keeps_of_each_image(layout, 0.59)
    fine = int((layout.scale == 0).sum())
    assert layout.read_ratio == pytest.approx((2 * 16 + fine) / 128)  # all in big patches, then the fine ones
    assert layout.read_ratio == pytest.approx(0.7, abs=3 / 64)


@after("segmenter = aptvit.dense.make_segmenter(adaptive, num_classes=19)")
@torch.no_grad()
def _(page: Page) -> None:
    """Scores are the variance of probabilities: none where all classes are always as likely."""
    ((_, scores),) = page.adaptive.scores(page.batch)
    assert (scores[2] > 0).all()
    segmenter = page.segmenter
    last = segmenter.head.classifier
    weight = last.weight.clone()
    last.weight.zero_()
    ((_, none),) = page.adaptive.scores(page.batch)
    last.weight.copy_(weight)
    assert float(none[2].abs().max()) < 1e-4 * float(scores[2].max())


@after("dense = aptvit.dense.from_pretrained('adaptive')")
def _(page: Page) -> None:
    assert (page.dense.task, page.dense.classes) == ("detection", ("red", "blue"))
    expected = page.written.state_dict()
    found = page.dense.network.state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@after("dense.network(images)")
@torch.no_grad()
def _(page: Page) -> None:
    for found, expected in zip(page.value, page.written(page.images), strict=True):
        assert set(found) == {"boxes", "labels", "scores"} and len(found["boxes"])
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values)


@after("dense.model.thresholds = (5.0,)")
def _(page: Page) -> None:
    is_cut_by_thresholds(page.dense.model, page.images, (5.0,))
