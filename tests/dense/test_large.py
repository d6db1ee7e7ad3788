"""Large images: results are in the image's own pixels, whether it is reduced or cut into tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor, nn

from aptvit.dense.detector import make_detector
from aptvit.dense.inference import Prediction, predict_image
from aptvit.dense.large import classes_at, masks_of, tiles
from aptvit.dense.saved import DenseModel
from aptvit.dense.segmenter import Segmenter, make_segmenter
from aptvit.measuring.memory import peak_memory
from aptvit.report.predictions import draw_prediction

CLASSES = ("dark", "middle", "bright")


@pytest.fixture
def dense(make_model: Callable[..., Any]) -> DenseModel:
    """A segmenter of three classes whose logits follow the brightness of each pixel."""
    segmenter = make_segmenter(make_model(thresholds=(5.0,)), 3, channels=16, auxiliary_channels=0).eval()

    class ByBrightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            gray = images.mean(1)
            return torch.stack([-gray, torch.full_like(gray, 0.3), gray], dim=1) * 4

    brightness = ByBrightness()
    segmenter.forward = lambda images, layout=None: brightness(images)  # type: ignore[method-assign]
    return DenseModel(segmenter, "segmentation", CLASSES, {"slide": False, "crop": 128, "longer_side": 0})


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut()).resize((1000, 700))


@pytest.mark.parametrize("size", [(700, 1001), (90, 100), (33, 7)])
def test_classes_in_strips_are_those_of_a_whole_enlargement(size: tuple[int, int]) -> None:
    probabilities = torch.randn(5, 40, 30).softmax(0)
    whole = F.interpolate(probabilities[None], size=size, mode="bilinear", align_corners=False)[0]
    first, second = whole.topk(2, dim=0).values
    clear = (first - second > 1e-5).numpy()  # ties fall either way
    assert (
        np.array_equal(classes_at(probabilities, size)[clear], whole.argmax(0).numpy()[clear]) and clear.mean() > 0.99
    )


@pytest.mark.parametrize(
    ("size", "side"), [((700, 1000), 256), ((3000, 4000), 1024), ((100, 1000), 256), ((64, 64), 64)]
)
def test_tiles_cover_each_pixel_once(size: tuple[int, int], side: int) -> None:
    count, inside = np.zeros(size, int), tiles(size, side)
    for (rows, cols), (inner_rows, inner_cols) in inside:
        count[inner_rows, inner_cols] += 1
        assert rows.start <= inner_rows.start and inner_rows.stop <= rows.stop <= size[0]
        assert cols.start <= inner_cols.start and inner_cols.stop <= cols.stop <= size[1]
        assert rows.stop - rows.start == min(side, size[0]) and cols.stop - cols.start == min(side, size[1])
    assert (count == 1).all()
    starts = sorted({cols.start for (_, cols), _ in inside})
    assert all(right - left <= side * 3 / 4 + 1 for left, right in pairwise(starts))


def test_tiles_of_a_segmenter_are_the_whole_image(dense: DenseModel, photo: Image.Image) -> None:
    """Classes that follow single pixels cannot depend on how the image is cut."""
    whole, tiled = predict_image(dense, photo), predict_image(dense, photo, tile=256)
    assert whole.num_tiles == 1 and whole.read_size == (700, 1000) and whole.patches is not None
    assert tiled.num_tiles == len(tiles((700, 1000), 256)) and tiled.read_size == (256, 256) and tiled.patches is None
    assert len(np.unique(whole.classes)) == 3
    assert np.array_equal(tiled.classes, whole.classes)  # type: ignore[arg-type]
    assert tiled.uniform_tokens == tiled.num_tiles * 16**2


def test_a_reduced_image_is_segmented_in_its_own_pixels(dense: DenseModel, photo: Image.Image) -> None:
    reduced = predict_image(dense, photo, max_side=500)
    assert reduced.read_size == (350, 500) and reduced.classes is not None and reduced.classes.shape == (700, 1000)
    small = photo.resize((500, 350), Image.Resampling.BICUBIC)
    normalised = dense.model.patchifier.normalization.normalised(
        torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
    )
    logits = dense.network(normalised).softmax(1)
    expected = F.interpolate(logits, size=(700, 1000), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    assert (reduced.classes == expected).mean() > 0.9999
    assert np.array_equal(predict_image(dense, photo, max_side=1000).classes, predict_image(dense, photo).classes)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"tile": 128}, pytest.param({"max_side": 256}, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_image(make_model: Callable[..., Any], option: dict[str, int]) -> None:
    """Nine times as many pixels: what grows is the result, a class for each pixel."""
    segmenter = make_segmenter(make_model(thresholds=(5.0,)), 3, channels=16, auxiliary_channels=0).eval()
    dense = DenseModel(segmenter, "segmentation", CLASSES, {"slide": False, "crop": 128, "longer_side": 0})
    small, large = (Image.fromarray(data.astronaut()).resize((side, side)) for side in (512, 1536))
    predict_image(dense, small, **option)  # what is computed once stays in memory
    peaks = [peak_memory(partial(predict_image, dense, image, **option), "cpu") for image in (small, large)]
    assert peaks[0] > 2**20
    strips = 3 * 256 * (1536 - 512) * 4 * 5  # of rows of probabilities, as long as the image is wide
    assert peaks[1] <= peaks[0] + strips + 2 * (1536**2 - 512**2)


@pytest.mark.slow
def test_a_hundred_masks_take_the_memory_of_one(photo: Image.Image) -> None:
    """Of a photo of 12 megapixels, also drawn: masks of its size would take 1.2 GB."""
    size = (3000, 4000)
    masks, boxes = masks_of(torch.rand(100, 1, 60, 80), size), np.tile([10.0, 10.0, 2000.0, 2000.0], (100, 1))
    labels, scores = np.zeros(100, int), np.ones(100)
    prediction = Prediction(boxes, labels, scores, masks, None, 1, 1, 1, (60, 80), 1, None)
    image = photo.resize(size[::-1])
    peak = peak_memory(lambda: draw_prediction(image, prediction, ["square"]), "cpu")
    assert sum(mask.probabilities.nbytes for mask in masks) == 100 * 60 * 80
    assert peak < 30 * size[0] * size[1]


class BrightSquares(nn.Module):
    """A detector that reports bright squares: in place of a trained network, with a known answer for each image."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone, self.transform, self.weight = network.backbone, network.transform, nn.Parameter(torch.zeros(1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        from skimage.measure import label, regionprops

        bright = images[0].mean(0).numpy() > 0.5
        regions = regionprops(label(bright))
        boxes = torch.tensor([(r.bbox[1], r.bbox[0], r.bbox[3], r.bbox[2]) for r in regions]).reshape(-1, 4).float()
        masks = torch.stack([torch.from_numpy(bright)] * len(regions))[:, None].float() if regions else None
        empty = torch.zeros(0, 1, *images[0].shape[1:])
        scores = (boxes[:, 2] - boxes[:, 0]) / 100  # parts of a square are less certain
        return [
            {
                "boxes": boxes,
                "labels": torch.ones(len(boxes), dtype=torch.long),
                "scores": scores,
                "masks": empty if masks is None else masks,
            }
        ]


@pytest.mark.parametrize("option", [{"max_side": 400}, {"tile": 256}, {}])
def test_boxes_and_masks_are_in_the_images_own_pixels(make_model: Callable[..., Any], option: dict[str, int]) -> None:
    squares = [(20, 40, 100, 120), (420, 300, 500, 380), (680, 500, 780, 596)]
    pixels = np.zeros((600, 800, 3), np.uint8)
    for left, top, right, bottom in squares:
        pixels[top:bottom, left:right] = 255
    detector = BrightSquares(make_detector(make_model(), 1, out_channels=16, image_size=128).eval())
    prediction = predict_image(
        DenseModel(detector, "detection", ("square",), {}), Image.fromarray(pixels), 0.3, **option
    )
    order = np.argsort(prediction.boxes[:, 0])
    assert np.allclose(prediction.boxes[order], squares, atol=2)
    assert prediction.masks is not None and len(prediction.masks) == 3
    for number, (left, top, right, bottom) in zip(order, squares, strict=True):
        mask, half = prediction.masks[number].pixels(), prediction.masks[number].pixels((300, 400))
        assert mask.shape == (600, 800) and mask[top + 2 : bottom - 2, left + 2 : right - 2].all()
        assert half.shape == (300, 400) and half[top // 2 + 2 : bottom // 2 - 2, left // 2 + 2 : right // 2 - 2].all()
        if "tile" not in option:
            assert (mask == (pixels[..., 0] > 0)).mean() > 0.99
    assert prediction.num_tiles == (12 if "tile" in option else 1)


def test_sizes_that_contradict_or_are_too_small(dense: DenseModel, photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="max_side=400 and tile=256: give one"):
        predict_image(dense, photo, max_side=400, tile=256)
    with pytest.raises(ValueError, match="tile=8: give 32 pixels or more"):
        predict_image(dense, photo, tile=8)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_batch_is_segmented_as_single_images(make_model: Callable[..., Any], mode: Any) -> None:
    segmenter: Segmenter = make_segmenter(make_model(thresholds=(5.0,)), 3, channels=16, auxiliary_channels=0).eval()
    images = torch.randn(2, 3, 150, 200)
    batch = segmenter.predict(images, mode, crop=128)
    assert batch.shape == (2, 3, 150, 200)
    torch.testing.assert_close(batch, torch.stack([segmenter.predict(image, mode, crop=128) for image in images]))
    with pytest.raises(ValueError, match=r"images of shape \(150, 200\): give one as \(C, H, W\), or a batch"):
        segmenter.predict(images[0, 0])
