"""What models answer about an image, a map, regions, boxes or points: how alike two answers are, and drawings of them.

`answers_of` reads the outputs of timm, of transformers and of dense networks. Drawings are over the image, that of a
difference in the colours of what only one of the two models answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou

from aptvit.report.drawing import heat_colours

__all__ = [
    "AnswerDrawings",
    "BoxAnswer",
    "ImageAnswer",
    "MapAnswer",
    "PointAnswer",
    "RegionAnswer",
    "answers_of",
    "drawings_of",
]

_LEAST_SCORE = 0.3  # of boxes that are drawn and compared
_MOST_BOXES = 100
_NEAR = 0.05  # of the sides of the image: how far apart the same point of two answers may be
_SAME, _UNIFORM, _ADAPTIVE = (38, 198, 182), (255, 90, 70), (255, 176, 46)


@dataclass(frozen=True, eq=False)
class AnswerDrawings:
    """Answers of both models over an image, each of the size of the image.

    Attributes:
        uniform: The uniform model's.
        adaptive: The adaptive model's.
        difference: Where they differ.
    """

    uniform: Image.Image
    adaptive: Image.Image
    difference: Image.Image


@dataclass(frozen=True, eq=False)
class ImageAnswer:
    """What a model answers about one image; in itself only numbers, of which nothing is drawn.

    Attributes:
        numbers: (n,) the output, flattened.
    """

    measure: ClassVar[str | None] = None  # of likeness, in words

    numbers: Tensor

    def likeness(self, uniform: Any) -> float | None:
        """How alike this answer and the uniform model's are, at most 1; None where that is not told by one number."""
        return None

    def drawn(self, image: np.ndarray, uniform: Any) -> Image.Image | None:
        """The answer over an image, in the colours of the uniform model's.

        Args:
            image: (H, W, 3) uint8.
            uniform: The uniform model's answer, which may be this one.
        """
        return None

    def difference(self, image: np.ndarray, uniform: Any) -> Image.Image | None:
        """Where this answer differs from the uniform model's.

        Args:
            image: (H, W, 3) uint8.
            uniform: The uniform model's answer.
        """
        return None


@dataclass(frozen=True, eq=False)
class MapAnswer(ImageAnswer):
    """A number for each pixel: depth, or what stands out.

    Attributes:
        values: (h, w).
    """

    measure: ClassVar[str | None] = "correlation of the maps"

    values: Tensor

    def likeness(self, uniform: MapAnswer) -> float:
        """Pearson's correlation over the pixels."""
        centred, reference = (answer.values.flatten() - answer.values.mean() for answer in (self, uniform))
        return float(F.cosine_similarity(centred, reference, dim=0))

    def drawn(self, image: np.ndarray, uniform: MapAnswer) -> Image.Image:
        """From dark to bright, over the range of the uniform model's map."""
        low, high = uniform.values.min(), uniform.values.max()
        return _heat((self.values - low) / (high - low).clamp(min=1e-12), image)

    def difference(self, image: np.ndarray, uniform: MapAnswer) -> Image.Image:
        """Bright where the maps differ by a quarter of the uniform map's range or more."""
        extent = (uniform.values.max() - uniform.values.min()).clamp(min=1e-12)
        return _heat(4 * (self.values - uniform.values).abs() / extent, image)


@dataclass(frozen=True, eq=False)
class RegionAnswer(ImageAnswer):
    """A class for each pixel.

    Attributes:
        classes: (h, w) integers.
    """

    measure: ClassVar[str | None] = "pixels of the same class"

    classes: Tensor

    def likeness(self, uniform: RegionAnswer) -> float:
        """Share of the pixels that have the same class."""
        return float((self.classes == uniform.classes).float().mean())

    def drawn(self, image: np.ndarray, uniform: RegionAnswer) -> Image.Image:
        """A colour for each class."""
        classes = _resized(self.classes, image)
        return _blended(image, _colours(classes), 0.65)

    def difference(self, image: np.ndarray, uniform: RegionAnswer) -> Image.Image:
        """Red where the class is another."""
        differs = _resized((self.classes != uniform.classes).long(), image)
        return _blended(_gray(image), np.array(_UNIFORM), 0.8 * differs[..., None])


@dataclass(frozen=True, eq=False)
class BoxAnswer(ImageAnswer):
    """Boxes with classes.

    Attributes:
        boxes: (n, 4) left, top, right, bottom as shares of the image.
        classes: (n,) integers.
        scores: (n,) in descending order.
        names: Name of each class; None for numbers.
    """

    measure: ClassVar[str | None] = "boxes that both find (F1 at IoU 0.5)"

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    names: Sequence[str] | None = None

    def likeness(self, uniform: BoxAnswer) -> float:
        """F1 of the boxes of the same class that overlap by half, the best first."""
        count = len(self.boxes) + len(uniform.boxes)
        return 2 * len(self._matches(uniform)) / count if count else 1.0

    def _matches(self, uniform: BoxAnswer) -> dict[int, int]:
        """For each box that the uniform model also has its number there: the best free one of the same class."""
        overlaps = box_iou(self.boxes, uniform.boxes)
        overlaps = overlaps * (self.classes[:, None] == uniform.classes)
        matches: dict[int, int] = {}
        for number, row in enumerate(overlaps):  # in descending order of scores
            row = row.clone()
            row[list(matches.values())] = 0
            if row.numel() and row.max() >= 0.5:
                matches[number] = int(row.argmax())
        return matches

    def drawn(self, image: np.ndarray, uniform: BoxAnswer) -> Image.Image:
        """Boxes with the names of their classes."""
        drawn = Image.fromarray(image)
        for number in range(len(self.boxes)):
            self._draw(drawn, number, _SAME, True)
        return drawn

    def difference(self, image: np.ndarray, uniform: BoxAnswer) -> Image.Image:
        """Boxes that only the uniform model has in red, those that only the adaptive model has in yellow."""
        drawn, matches = Image.fromarray(_gray(image)), self._matches(uniform)
        for number in set(range(len(self.boxes))) - set(matches):
            self._draw(drawn, number, _ADAPTIVE, True)
        for number in set(range(len(uniform.boxes))) - set(matches.values()):
            uniform._draw(drawn, number, _UNIFORM, True)
        return drawn

    def _draw(self, image: Image.Image, number: int, colour: tuple[int, int, int], is_named: bool) -> None:
        draw, width = ImageDraw.Draw(image), max(2, max(image.size) // 200)
        box = (self.boxes[number] * torch.tensor([image.width, image.height] * 2)).tolist()
        draw.rectangle((box[0], box[1], max(box[0], box[2]), max(box[1], box[3])), outline=colour, width=width)
        if is_named:
            label = int(self.classes[number])
            text = self.names[label] if self.names is not None and label < len(self.names) else f"class {label}"
            draw.text((box[0] + width + 1, box[1] + width), text, colour, ImageFont.load_default(max(image.size) / 40))


@dataclass(frozen=True, eq=False)
class PointAnswer(ImageAnswer):
    """Points, such as the joints of a person.

    Attributes:
        points: (k, 2) x and y as shares of the image.
    """

    measure: ClassVar[str | None] = "points within 5 % of the image's sides"

    points: Tensor

    def likeness(self, uniform: PointAnswer) -> float:
        """Share of the points that are near each other."""
        return float(((self.points - uniform.points).norm(dim=1) <= _NEAR).float().mean())

    def drawn(self, image: np.ndarray, uniform: PointAnswer) -> Image.Image:
        """A dot for each point."""
        return self._draw(Image.fromarray(image), _SAME)

    def difference(self, image: np.ndarray, uniform: PointAnswer) -> Image.Image:
        """Points of the uniform model in red, those of the adaptive model in yellow, with lines between them."""
        drawn = Image.fromarray(_gray(image))
        size, draw = torch.tensor(drawn.size), ImageDraw.Draw(drawn)
        for pair in zip(uniform.points * size, self.points * size, strict=True):
            draw.line([tuple(point.tolist()) for point in pair], fill=(255, 255, 255), width=max(1, drawn.width // 300))
        return self._draw(uniform._draw(drawn, _UNIFORM), _ADAPTIVE)

    def _draw(self, image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
        draw, radius = ImageDraw.Draw(image), max(image.size) / 100
        for x, y in (self.points * torch.tensor(image.size)).tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return image


def drawings_of(image: np.ndarray, uniform: ImageAnswer, adaptive: ImageAnswer) -> AnswerDrawings | None:
    """AnswerDrawings of both answers about an image; None for answers that are only numbers.

    Args:
        image: (H, W, 3) uint8.
        uniform: The uniform model's.
        adaptive: The adaptive model's.
    """
    sides = [uniform.drawn(image, uniform), adaptive.drawn(image, uniform), adaptive.difference(image, uniform)]
    present = [side for side in sides if side is not None]
    return AnswerDrawings(*present) if len(present) == 3 else None


def answers_of(output: Any, names: Sequence[str] | None = None) -> list[ImageAnswer]:
    """The answer of each image of a batch.

    Args:
        output: A tensor of logits (B, classes), of features or of maps (B, h, w); or an output of transformers.
        names: Names of the classes of boxes.

    Raises:
        ValueError: If there are no numbers for each image in it.
    """
    numbers = _numbers(output)
    if isinstance(output, Tensor):
        if output.ndim == 3:
            return [MapAnswer(flat, values) for flat, values in zip(numbers, _on_cpu(output), strict=True)]
        return [ImageAnswer(flat) for flat in numbers]
    made: list[Any]
    if hasattr(output, "predicted_depth"):
        made = [(MapAnswer, (values,)) for values in _on_cpu(output.predicted_depth)]
    elif hasattr(output, "pred_boxes"):
        made = [(BoxAnswer, (*parts, names)) for parts in zip(*_best_boxes(output), strict=True)]
    elif hasattr(output, "masks_queries_logits"):
        made = [(RegionAnswer, (classes,)) for classes in _classes_of_queries(output)]
    elif hasattr(output, "heatmaps"):
        made = [(PointAnswer, (points,)) for points in _peaks(_on_cpu(output.heatmaps))]
    elif _ndim(output) == 4:
        made = [(RegionAnswer, (classes,)) for classes in _on_cpu(output.logits).argmax(1)]
    elif _ndim(output) == 3:
        made = [(MapAnswer, (values,)) for values in _on_cpu(output.logits).sigmoid()]
    else:
        made = [(ImageAnswer, ()) for _ in numbers]
    return [kind(flat, *parts) for flat, (kind, parts) in zip(numbers, made, strict=True)]


def _ndim(output: Any) -> int:
    logits = getattr(output, "logits", None)
    return logits.ndim if isinstance(logits, Tensor) else 0


_FIELDS = (
    *("predicted_depth", "pred_boxes", "masks_queries_logits", "class_queries_logits", "heatmaps", "logits"),
    *("image_embeds", "pooler_output", "last_hidden_state", "feature_maps"),
)


def _numbers(output: Any) -> list[Tensor]:
    """For each image the output, flattened: of the first fields that it has, on the CPU in float32."""
    if isinstance(output, Tensor):
        return list(_on_cpu(output).flatten(1))
    present = [name for name in _FIELDS if getattr(output, name, None) is not None]
    if not present:
        raise ValueError(f"a {type(output).__name__} has no field that can be compared: none of {', '.join(_FIELDS)}")
    several = present[:2] if present[0] in ("pred_boxes", "masks_queries_logits") else present[:1]
    values: list[Any] = [getattr(output, name) for name in several]
    if present[0] == "feature_maps":
        values = list(values[0])
    batches = zip(*values, strict=True)  # of tensors, or of lists with a tensor for each image
    return [torch.cat([_on_cpu(part).flatten() for part in parts]) for parts in batches]


def _on_cpu(values: Tensor) -> Tensor:
    return values.detach().float().cpu()


def _best_boxes(output: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Boxes, classes and scores of each image, from logits without a class for nothing.

    A box may have several classes, as detectors of the DETR family read them; with open vocabulary it has the best.
    """
    probabilities = _on_cpu(output.logits).sigmoid()
    if hasattr(output, "image_embeds"):
        best = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.where(probabilities == best, 0.0)
    x, y, width, height = _on_cpu(output.pred_boxes).unbind(-1)
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1).clamp(0, 1)
    boxes, classes, scores = [], [], []
    for of_image, places in zip(probabilities, corners, strict=True):
        best, order = of_image.flatten().topk(min(_MOST_BOXES, of_image.numel()))
        order = order[best > _LEAST_SCORE]
        boxes.append(places[order // of_image.shape[1]])
        classes.append(order % of_image.shape[1])
        scores.append(best[: len(order)])
    return boxes, classes, scores


def _classes_of_queries(output: Any) -> Tensor:
    """(B, h, w): of each pixel the class for which its queries, each with a mask, have the largest sum."""
    classes = _on_cpu(output.class_queries_logits).softmax(-1)[..., :-1]  # the last is no class
    masks = _on_cpu(output.masks_queries_logits).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks).argmax(1)


def _peaks(heatmaps: Tensor) -> Tensor:
    """(B, k, 2): where each heat map is largest, as shares of the image."""
    height, width = heatmaps.shape[2:]
    place = heatmaps.flatten(2).argmax(-1)
    return torch.stack([(place % width + 0.5) / width, (place // width + 0.5) / height], -1)


def _heat(levels: Tensor, image: np.ndarray) -> Image.Image:
    """Levels from 0 to 1 as a heat map of the size of an image."""
    drawn = Image.fromarray(heat_colours(levels.clamp(0, 1).nan_to_num(0.0).numpy()))
    return drawn.resize((image.shape[1], image.shape[0]), Image.Resampling.BILINEAR)


def _resized(classes: Tensor, image: np.ndarray) -> np.ndarray:
    """(H, W) classes at the size of an image."""
    resized = F.interpolate(classes[None, None].float(), size=image.shape[:2], mode="nearest")
    return resized[0, 0].long().numpy()


def _colours(classes: np.ndarray) -> np.ndarray:
    """(H, W, 3) a colour for each class, that of a hue far from its neighbours'."""
    hue = (classes * 0.618034) % 1.0  # the golden ratio spreads any number of hues
    channels = [np.abs((hue + shift) % 1.0 * 6 - 3) - 1 for shift in (0.0, 2 / 3, 1 / 3)]
    return 255 * np.stack(channels, -1).clip(0, 1)


def _blended(image: np.ndarray, colour: np.ndarray, opacity: Any) -> Image.Image:
    return Image.fromarray(np.rint(image * (1 - opacity) + colour * opacity).astype(np.uint8))


def _gray(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) the image in gray and darker, under drawings."""
    return (0.6 * image.mean(-1, keepdims=True)).astype(np.uint8).repeat(3, -1)
