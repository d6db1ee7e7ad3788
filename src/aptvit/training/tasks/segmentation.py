"""Learning to segment: UperNet on adaptive patches, random scales and crops, and the mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.dense.content import KeptTokens
from aptvit.dense.saved import save, start_from
from aptvit.dense.segmenter import Segmenter, make_segmenter
from aptvit.files.annotations import MaskFiles
from aptvit.hosts.pretrained import Host
from aptvit.measuring.rounds import Ratio
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.spread import Answers
from aptvit.training.data import Batch
from aptvit.training.objectives import map_losses
from aptvit.training.recipes.segmentation import SegmentationRecipe
from aptvit.training.tasks.datasets import ContentSamples, MaskDataset
from aptvit.training.tasks.dense import (
    MapTeacher,
    adaptive_backbone,
    answers_in_eval,
    check_start,
    freeze_heads,
    freeze_unread,
    step_speedup,
    window_pixels,
)
from aptvit.training.tasks.task import Losses

__all__ = ["PixelTask", "SegmentationLearner", "score_segmenter"]

_IGNORED = 255


class SegmentationLearner(nn.Module):
    """A segmenter whose forward pass gives losses, or logits where there are no labels."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def train(self, mode: bool = True) -> SegmentationLearner:
        super().train(mode)
        for module in self.modules():  # frozen parts must not follow the images in their statistics
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
        """(B, C, H, W) normalised images -> (B,) losses, or (B, classes, H, W) logits.

        With expected maps: (B,) distances from these.
        """
        if expected is not None:
            return map_losses(self.segmenter.backbone.maps(images, layout), expected)
        if labels is None:
            logits: Tensor = self.segmenter(images, layout)
            return logits
        return self.segmenter.losses(images, labels, layout)


class PixelTask:
    """See `aptvit.training.tasks.task.Task`; arguments as for `make_task`."""

    new_head = False
    interpolate = 0.0
    evaluated_at_once = 1  # images differ in size

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
            "ignore_index": _IGNORED,
            "detail": recipe.detail and recipe.method != "uniform",
        }
        self.network = make_segmenter(self.model, **self.options).to(device)
        freeze_unread(self.model, max(self.network.backbone.indices))
        if recipe.from_maps:
            freeze_heads(self.network)
        self.teacher: MapTeacher | None = None
        self.uniform_answers: Answers | None = None
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
        self.uniform_answers = answers_in_eval(self.network, self.model, self._outputs)
        if self.recipe.from_maps:
            self.teacher = MapTeacher(self.network.backbone)

    def _normalised(self, images: Tensor) -> Tensor:
        return self.model.patchifier.normalization.normalised(images.to(self.device, non_blocking=True))

    def _prepare(self, image: Tensor) -> Tensor:
        return self._normalised(image[None])[0]

    def _outputs(self, images: Tensor) -> Tensor:
        """Probabilities of the classes of each pixel."""
        logits: Tensor = self.network(images)
        return logits.softmax(1)

    def model_in(self, network: Any) -> Any:
        return network.backbone.model

    def learner(self, network: Any) -> SegmentationLearner:
        return SegmentationLearner(network)

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        images, labels = self._normalised(part.images), part.targets.to(self.device)
        number = len(images)
        if number == 1:  # twice: heads that pool an image to one row cannot normalise over it alone
            images, labels = images.expand(2, -1, -1, -1), labels.expand(2, -1, -1)
        with accelerator.autocast():
            layout = self.model.layout(images, learn=True)
            each = learner(images, labels, layout, None if self.teacher is None else self.teacher(images))
        return Losses(each[:number], layout.keep_ratio, layout.seqlens[:number])

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        return score_segmenter(learner, network, batches, accelerator, self.inference)

    def speedup(self, accelerator: Any) -> Ratio:
        return step_speedup(self, self.recipe.micro_batch_size or 4, accelerator)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save(folder, self.model, "segmentation", self.classes, self.options, weights, self.inference)


@torch.no_grad()
def score_segmenter(
    learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any, inference: Mapping[str, Any]
) -> dict[str, float]:
    """Mean intersection over union, over all pixels of all images, at the size of the masks.

    Args:
        learner: What runs: a `SegmentationLearner`.
        network: The segmenter inside.
        batches: The images of this process, one in each batch.
        accelerator: For the device, and the type to compute in.
        inference: As for `aptvit.dense.DenseModel`.

    Returns:
        ``miou``, ``accuracy`` of pixels; ``kept``, and ``kept_content`` without padding: tokens over those of the
        uniform model; ``read`` of a model that reads twice, all that go through its blocks. Over the images of all
        processes.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    model, device = network.backbone.model, accelerator.device
    common = {"num_classes": network.num_classes, "ignore_index": _IGNORED, "validate_args": False}
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
        reads: list[tuple[Tensor, PatchLayout]] = []

        def run(padded: Tensor, reads: list[tuple[Tensor, PatchLayout]] = reads) -> Tensor:
            reads.append((padded, model.layout(padded)))
            with accelerator.autocast():
                logits: Tensor = learner(padded, None, reads[-1][1])
            return logits

        mode = "slide" if inference["slide"] else "whole"
        number = len(network.crops(tuple(image.shape[1:]), mode, inference["crop"]))
        most = int(accelerator.gather(torch.tensor([number], device=device)).max())
        found = network.predict(image, mode, inference["crop"], run=run)
        for _ in range(most - number):  # sharded parameters are gathered in each pass, so all processes make as many
            learner(reads[-1][0], None, reads[-1][1])
        if not batch.valid[0]:
            continue
        found = F.interpolate(found[None], size=labels.shape[1:], mode="bilinear", align_corners=False)
        answers = found.argmax(1)
        for metric in metrics.values():
            metric.update(answers, labels)
        for _, layout in reads:
            (grid,) = layout.grid_sizes
            content = [min(a, b * layout.patch_size) for a, b in zip(image.shape[1:], grid, strict=True)]
            kept.add(layout, [(content[0], content[1])], grid[0] * grid[1], content[0] * content[1])
    learner.train(was_training)
    return {name: float(metric.compute()) for name, metric in {**metrics, **kept.means}.items()}
