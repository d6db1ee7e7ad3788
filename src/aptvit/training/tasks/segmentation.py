"""Segmentation: UperNet on adaptive patches, trained on random crops; the metric is mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.datasets.masks import MaskFiles
from aptvit.dense.content import KeptTokens
from aptvit.dense.saved import save, start_from
from aptvit.dense.segmenter import Segmenter, make_segmenter
from aptvit.hosts.pretrained import Host
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.sizes import Answers
from aptvit.training.data import Batch
from aptvit.training.objectives import map_losses
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.tasks.datasets import ContentSamples, MaskDataset
from aptvit.training.tasks.dense import (
    MapTeacher,
    adaptive_backbone,
    check_start,
    evaluation_outputs,
    freeze_heads,
    freeze_unused,
    step_speedup,
    window_pixels,
)
from aptvit.training.tasks.task import Losses

__all__ = ["PixelTask", "SegmentationLearner", "score_segmenter"]


class SegmentationLearner(nn.Module):
    """A segmenter whose forward pass takes the layout of the images, and returns losses or logits.

    Args:
        segmenter: Segmenter of `aptvit.dense.make_segmenter`.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def train(self, mode: bool = True) -> SegmentationLearner:
        super().train(mode)
        for module in self.modules():  # frozen layers must not update their statistics
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None,
        layout: PatchLayout | None,
        expected: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run the segmenter.

        Args:
            images: (B, C, H, W) normalised images.
            labels: (B, H, W) classes of pixels; None to segment.
            layout: Layout of the images.
            expected: Feature maps of a teacher, (B, D, h, w) each.

        Returns:
            With expected maps the distances to them, (B,); with labels the losses, (B,); otherwise logits,
            (B, classes, H, W).
        """
        if expected is not None:
            return map_losses(self.segmenter.backbone.maps(images, layout), expected)
        if labels is None:
            logits: Tensor = self.segmenter(images, layout)
            return logits
        return self.segmenter.losses(images, labels, layout)


class PixelTask:
    """Segmentation. Implements `aptvit.training.tasks.task.Task`; arguments as for `make_task`."""

    new_head, note = False, ""
    interpolate = 0.0
    evaluation_batch_size = 1  # images differ in size

    def __init__(
        self,
        recipe: SegmentationRecipe,
        host: Host,
        images: MaskFiles,
        evaluation: MaskFiles | None,
        device: torch.device,
    ) -> None:
        if not isinstance(images, MaskFiles):
            raise ValueError("objective=pixels needs images with masks: read them with aptvit.dense.find_masks")
        self.recipe, self.device, self.classes = recipe, device, images.classes
        self.model = adaptive_backbone(host, recipe)
        self.options: dict[str, Any] = {
            "num_classes": images.num_classes,
            "indices": list(recipe.depths) or None,
            "channels": recipe.channels,
            "auxiliary_channels": recipe.channels // 2,
            "ignore_index": images.no_class,
            "detail": recipe.detail and recipe.method != "uniform",
        }
        self.network = make_segmenter(self.model, **self.options).to(device)
        freeze_unused(self.model, max(self.network.backbone.indices))
        if recipe.from_maps:
            freeze_heads(self.network)
        self.teacher: MapTeacher | None = None
        self.uniform_outputs: Answers | None = None
        self.inference = {"slide": recipe.slide, "crop": recipe.size, "longer_side": recipe.test_size}
        self.images = MaskDataset(images, recipe)
        self.evaluation = None if evaluation is None else MaskDataset(evaluation, longer_side=recipe.test_size)
        plain = MaskDataset(images, longer_side=recipe.test_size)
        self.samples = ContentSamples(plain, self._prepare, window_pixels(self.model))

    def start_from(self, folder: Path | None) -> None:
        check_start(self.recipe, folder)
        if folder is None:
            return
        start_from(self.network, folder)
        self.uniform_outputs = evaluation_outputs(self.network, self.model, self._outputs)
        if self.recipe.from_maps:
            self.teacher = MapTeacher(self.network.backbone)

    def _normalised(self, images: Tensor) -> Tensor:
        return self.model.patchifier.normalization.normalised(images.to(self.device, non_blocking=True))

    def _prepare(self, image: Tensor) -> Tensor:
        return self._normalised(image[None])[0]

    def _outputs(self, images: Tensor) -> Tensor:
        """Class probabilities of each pixel, (B, classes, H, W)."""
        logits: Tensor = self.network(images)
        return logits.softmax(1)

    def model_of(self, network: Any) -> Any:
        return network.backbone.model

    def learner(self, network: Any) -> SegmentationLearner:
        return SegmentationLearner(network)

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        images, labels = self._normalised(part.images), part.targets.to(self.device)
        number = len(images)
        if number == 1:  # duplicated, because batch normalisation after pooling needs two images
            images, labels = images.expand(2, -1, -1, -1), labels.expand(2, -1, -1)
        with accelerator.autocast():
            layout = self.model.layout(images, learn=True)
            losses = learner(images, labels, layout, None if self.teacher is None else self.teacher(images))
        return Losses(losses[:number], layout.keep_ratio, layout.seqlens[:number])

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        return score_segmenter(learner, network, batches, accelerator, self.inference)

    def speedup(self, accelerator: Any, most: int, progress: Progress = silent) -> Ratio:
        return step_speedup(self, min(most, 4), accelerator, progress)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save(folder, self.model, "segmentation", self.classes, self.options, weights, self.inference)


@torch.no_grad()
def score_segmenter(
    learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any, inference: Mapping[str, Any]
) -> dict[str, float]:
    """Compute the mean intersection over union of a segmenter, over all pixels, at the size of the masks.

    Args:
        learner: The `SegmentationLearner` that is run.
        network: The segmenter inside the learner.
        batches: Batches of a single image, the images of this process.
        accelerator: accelerate's Accelerator, for the device and the type to compute in.
        inference: Options of inference, as for `aptvit.dense.DenseModel`.

    Returns:
        Metrics over the images of all processes: ``miou``; ``accuracy`` of pixels; ``kept``, tokens over those of the
        uniform model, and ``kept_content``, the same without padding; for a scorer with two passes ``read``, the tokens
        of both passes over those of the uniform model.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    model, device = network.backbone.model, accelerator.device
    common = {"num_classes": network.num_classes, "ignore_index": network.ignore_index, "validate_args": False}
    metrics: dict[str, Any] = {
        "miou": MulticlassJaccardIndex(**common).to(device),
        "accuracy": MulticlassAccuracy(average="micro", **common).to(device),
    }
    kept = KeptTokens(model, device)
    was_training = learner.training
    learner.eval()
    for batch in batches:
        image = model.patchifier.normalization.normalised(batch.images[0][None].to(device))[0]
        labels = batch.targets[0].to(device)[None].long()
        passes: list[tuple[Tensor, PatchLayout]] = []

        def run(padded: Tensor, passes: list[tuple[Tensor, PatchLayout]] = passes) -> Tensor:
            passes.append((padded, model.layout(padded)))
            with accelerator.autocast():
                crop_logits: Tensor = learner(padded, None, passes[-1][1])
            return crop_logits

        mode = "slide" if inference["slide"] else "whole"
        number = len(network.crops(tuple(image.shape[1:]), mode, inference["crop"]))
        most = int(accelerator.gather(torch.tensor([number], device=device)).max())
        logits = network.predict(image, mode, inference["crop"], run=run)
        for _ in range(
            most - number
        ):  # all processes make as many passes, because sharded parameters are gathered in each
            learner(passes[-1][0], None, passes[-1][1])
        if not batch.valid[0]:
            continue
        logits = F.interpolate(logits[None], size=labels.shape[1:], mode="bilinear", align_corners=False)
        classes = logits.argmax(1)
        for metric in metrics.values():
            metric.update(classes, labels)
        for _, layout in passes:
            (grid,) = layout.grid_sizes
            content = [min(a, b * layout.patch_size) for a, b in zip(image.shape[1:], grid, strict=True)]
            kept.add(layout, [(content[0], content[1])], grid[0] * grid[1], content[0] * content[1])
    learner.train(was_training)
    return {name: float(metric.compute()) for name, metric in {**metrics, **kept.means}.items()}
