"""Semantic segmentation on adaptive patches: UperNet's heads from transformers behind EVA-02's neck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.dense.backbone import TransformersBackbone
from aptvit.dense.pyramid import DepthPyramid
from aptvit.measuring.progress import Progress, silent
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.preview import PreviewScorer

__all__ = ["Segmenter", "make_segmenter"]


class Segmenter(nn.Module):
    """A backbone, a head, and an auxiliary head for training.

    Args:
        backbone: From images to levels, the largest first.
        head: From levels to (B, classes, h, w) logits.
        num_classes: Number of classes.
        auxiliary: A second head, used in the loss only; None for none.
        auxiliary_weight: Weight of the auxiliary head's loss.
        ignore_index: Label of pixels without a loss.
    """

    def __init__(
        self,
        backbone: TransformersBackbone,
        head: nn.Module,
        num_classes: int,
        auxiliary: nn.Module | None = None,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_classes = num_classes
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight
        self.ignore_index = ignore_index
        for part in (backbone.neck, head, auxiliary):
            if part is not None:
                part.to(memory_format=torch.channels_last)  # as convolutions of CPUs and tensor cores want it
        scorer = backbone.model.patchifier.scorer
        if isinstance(scorer, PreviewScorer):
            scorer.preview = backbone.preview(self, self._probabilities_of_maps)

    def _probabilities_of_maps(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, classes, h, w) probabilities at the resolution of the head."""
        logits: Tensor = self.head(self.backbone.levels(maps))
        return logits.float().softmax(1)

    def forward(self, images: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """Segment images.

        Args:
            images: (B, C, H, W) normalised images.
            layout: The layout of the images; by default it is computed.

        Returns:
            (B, classes, H, W) logits.
        """
        return self._full_size(self.head(self.backbone.feature_maps(images, layout)), images)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile blocks, neck and heads, each by itself; takes the arguments of ``torch.compile``."""
        for part in (self.backbone, self.head, self.auxiliary):
            if part is not None:
                part.compile(*args, **kwargs)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The () mean of `losses`, after `check_labels`. Arguments and errors as there."""
        self.check_labels(images, labels)
        return self.losses(images, labels).mean()

    def losses(self, images: Tensor, labels: Tensor, layout: PatchLayout | None = None) -> Tensor:
        """Cross-entropy of both heads for each image, the mean over its pixels.

        Args:
            images: (B, C, H, W) normalised images.
            labels: (B, H, W) class of each pixel, or ``ignore_index``.
            layout: The layout of the images; by default it is computed.

        Returns:
            (B,) losses; zero, with gradients, for images whose pixels are all ignored.

        Raises:
            ValueError: If labels are of another size than the images.
        """
        levels = self.backbone.feature_maps(images, layout)
        total = self._cross_entropy(self.head(levels), images, labels)
        if self.auxiliary is not None:
            total = total + self.auxiliary_weight * self._cross_entropy(self.auxiliary(levels), images, labels)
        return total

    def check_labels(self, images: Tensor, labels: Tensor) -> None:
        """Check labels. Synchronises with the device.

        Args:
            images: (B, C, H, W).
            labels: (B, H, W).

        Raises:
            ValueError: If labels are of another size than the images, or a class does not exist.
        """
        if labels.shape != (len(images), *images.shape[2:]):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are not one for each pixel of images of shape "
                f"{tuple(images.shape)}: resize masks with the images, to nearest neighbours"
            )
        unknown = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_classes))]
        if len(unknown):
            raise ValueError(
                f"label {int(unknown[0])} is out of range: there are classes 0 to {self.num_classes - 1}, and "
                f"{self.ignore_index} for pixels to ignore"
            )

    def _cross_entropy(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        logits = self._full_size(logits, images).float()
        losses = F.cross_entropy(logits, labels.long(), ignore_index=self.ignore_index, reduction="none")  # (B, H, W)
        return losses.sum((1, 2)) / (labels != self.ignore_index).sum((1, 2)).clamp(min=1)

    @staticmethod
    def _full_size(logits: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)

    @torch.no_grad()
    def predict(
        self,
        image: Tensor,
        mode: Literal["whole", "slide"] = "whole",
        crop: int = 512,
        stride: int | None = None,
        run: Callable[[Tensor], Tensor] | None = None,
        progress: Progress = silent,
    ) -> Tensor:
        """Probabilities of the classes for images of any size, which are padded to whole patches or windows.

        Args:
            image: (C, H, W), normalised; or a batch, (B, C, H, W).
            mode: "whole", or "slide": overlapping crops, whose probabilities are averaged.
            crop: Side of a crop in pixels.
            stride: Distance of crops in pixels; two thirds of a crop by default.
            run: Replacement of the forward: (B, C, H, W) -> (B, classes, H, W) logits.
            progress: Wraps the crops.

        Returns:
            (classes, H, W) probabilities; (B, classes, H, W) for a batch.

        Raises:
            ValueError: If the image has other dimensions, the mode does not exist, or crops would leave gaps.
        """
        if image.ndim not in (3, 4):
            raise ValueError(f"images of shape {tuple(image.shape)}: give one as (C, H, W), or a batch (B, C, H, W)")
        images = image if image.ndim == 4 else image[None]
        height, width = images.shape[2:]
        windows = self.crops((height, width), mode, crop, stride)
        if len(windows) == 1:
            total = self._probabilities(images, run or self)
        else:
            total, count = (
                images.new_zeros(len(images), self.num_classes, height, width),
                images.new_zeros(height, width),
            )
            for window in progress(windows, "crops", len(windows)):
                total[:, :, *window] += self._probabilities(images[:, :, *window], run or self)
                count[window] += 1
            total /= count
        return total if image.ndim == 4 else total[0]

    @staticmethod
    def crops(
        size: tuple[int, int], mode: str, crop: int = 512, stride: int | None = None
    ) -> list[tuple[slice, slice]]:
        """Rows and columns of the crops that `predict` runs on.

        Args:
            size: (height, width) of the image in pixels.
            mode: As for `predict`.
            crop: As for `predict`.
            stride: As for `predict`.

        Raises:
            ValueError: If the mode does not exist, or crops would leave gaps.
        """
        if mode == "whole":
            return [(slice(0, size[0]), slice(0, size[1]))]
        if mode != "slide":
            raise ValueError(f"mode={mode!r} must be 'whole' or 'slide'")
        stride = crop * 2 // 3 if stride is None else stride
        if not 0 < stride <= crop:
            raise ValueError(f"stride={stride} must be between 1 and crop={crop}, or pixels are left out")
        tops, lefts = (_starts(side, crop, stride) for side in size)
        return [(slice(top, top + crop), slice(left, left + crop)) for top in tops for left in lefts]

    def _probabilities(self, images: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        model = self.backbone.model
        multiple = model.patch_size * (model.window_size or 1)
        height, width = images.shape[2:]
        # Two patches at least: the head halves the map of the last level.
        bottom, right = (-(-max(side, 2 * model.patch_size) // multiple) * multiple - side for side in (height, width))
        padded = F.pad(images, (0, right, 0, bottom))
        return run(padded)[:, :, :height, :width].float().softmax(1)


def _starts(length: int, crop: int, stride: int) -> list[int]:
    """First rows or columns of crops; the last crop ends at the image's edge."""
    if length <= crop:
        return [0]
    return [*range(0, length - crop, stride), length - crop]


def make_segmenter(
    model: AdaptivePatchTransformer,
    num_classes: int,
    indices: Sequence[int] | None = None,
    channels: int = 512,
    auxiliary_channels: int = 256,
    ignore_index: int = 255,
    detail: bool | None = None,
) -> Segmenter:
    """UperNet with an auxiliary FCN head, on four depths of an adaptive model.

    Args:
        model: The backbone.
        num_classes: Number of classes.
        indices: Four blocks, from early to late; by default the last block of each quarter.
        channels: Channels of the head.
        auxiliary_channels: Channels of the auxiliary head; 0 for none.
        ignore_index: Label of pixels without a loss.
        detail: Refine maps where patches are coarse, see `CellDetail`; by default unless the scorer is "preview".

    Raises:
        ValueError: If there are not four different indices, or fewer than two classes.
        ImportError: If transformers is not installed.
    """
    try:
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
    except ModuleNotFoundError as error:
        raise ImportError("the heads of UperNet come with transformers: pip install 'aptvit[hf]'") from error
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: segmentation needs at least two")
    depth = len(model.adapter.blocks)
    chosen = [depth * quarter // 4 - 1 for quarter in range(1, 5)] if indices is None else list(indices)
    if len(set(chosen)) != 4:
        raise ValueError(f"indices={chosen}: UperNet reads four different blocks of {depth}")
    config: Any = UperNetConfig(
        hidden_size=channels,
        auxiliary_channels=auxiliary_channels,
        num_labels=num_classes,
        loss_ignore_index=ignore_index,
    )
    if detail is None:
        detail = not isinstance(model.patchifier.scorer, PreviewScorer)
    backbone = TransformersBackbone(model, chosen, neck=DepthPyramid(model.embed_dim), detail=detail)
    auxiliary = UperNetFCNHead(config, backbone.channels) if auxiliary_channels else None
    head = UperNetHead(config, backbone.channels)
    return Segmenter(backbone, head, num_classes, auxiliary, ignore_index=ignore_index)
