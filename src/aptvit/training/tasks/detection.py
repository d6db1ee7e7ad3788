"""Detection: an R-CNN on adaptive patches, trained with large-scale jitter; metrics are COCO's average precision."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from aptvit.datasets.boxes import BoxFiles
from aptvit.dense.content import KeptTokens
from aptvit.dense.detector import make_detector
from aptvit.dense.saved import save, start_from
from aptvit.hosts.pretrained import Host
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.sizes import Answers, relative_channels
from aptvit.training.data import Batch
from aptvit.training.objectives import map_losses
from aptvit.training.recipes.detection import DetectionRecipe
from aptvit.training.tasks.datasets import BoxDataset, ContentSamples
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

__all__ = ["BoxTask", "DetectionLearner", "score_detector"]


class DetectionLearner(nn.Module):
    """A detector whose forward pass takes the layout of the images, and returns losses or boxes.

    Args:
        detector: Detector of `aptvit.dense.make_detector`.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self,
        images: ImageList,
        targets: list[dict[str, Tensor]] | None,
        layout: PatchLayout | None,
        expected: Sequence[Tensor] | None = None,
    ) -> Tensor | list[dict[str, Tensor]]:
        """Run the detector.

        Args:
            images: Images from the detector's transform.
            targets: Boxes and labels, with labels from 1; None to detect.
            layout: Layout of the images.
            expected: Feature maps of a teacher, (B, D, h, w) each.

        Returns:
            With expected maps the distances to them, (B,); with targets the sum of the detector's losses, (); otherwise
            for each image its boxes, labels and scores.
        """
        if expected is not None:
            return map_losses(self.detector.backbone.maps(images.tensors, layout), expected)
        levels: OrderedDict[str, Tensor] = self.detector.backbone(images.tensors, layout)
        proposals, losses = self.detector.rpn(images, levels, targets)
        detections, head_losses = self.detector.roi_heads(levels, proposals, images.image_sizes, targets)
        if targets is None:
            return detections
        return torch.stack([*losses.values(), *head_losses.values()]).sum()


class BoxTask:
    """Detection. Implements `aptvit.training.tasks.task.Task`; arguments as for `make_task`."""

    new_head, note = False, ""
    interpolate = 0.0

    def __init__(
        self, recipe: DetectionRecipe, host: Host, images: BoxFiles, evaluation: BoxFiles | None, device: torch.device
    ) -> None:
        if not isinstance(images, BoxFiles):
            raise ValueError("objective=boxes needs images with boxes: read them with aptvit.dense.find_boxes")
        self.recipe, self.device, self.classes = recipe, device, list(images.classes)
        self.model = adaptive_backbone(host, recipe)
        self.options: dict[str, Any] = {
            "num_classes": len(self.classes),
            "masks": recipe.masks,
            "cascade": recipe.cascade,
            "image_size": recipe.size,
            "out_channels": recipe.channels,
            "detail": recipe.detail and recipe.method != "uniform",
        }
        self.network: Any = make_detector(self.model, **self.options).to(device)
        freeze_unused(self.model, len(self.model.adapter.blocks) - 1)
        if recipe.from_maps:
            freeze_heads(self.network)
        self.teacher: MapTeacher | None = None
        self.uniform_outputs: Answers | None = None
        self.images = BoxDataset(images, recipe, recipe.masks)
        self.evaluation = None if evaluation is None else BoxDataset(evaluation, masks=recipe.masks)
        self.evaluation_batch_size = recipe.micro_batch_size or 4
        plain = BoxDataset(images, longest=2 * recipe.size)
        self.samples = ContentSamples(plain, self._prepare, window_pixels(self.model))

    def start_from(self, folder: Path | None) -> None:
        check_start(self.recipe, folder)
        if folder is None:
            return
        start_from(self.network, folder)
        self.uniform_outputs = evaluation_outputs(self.network, self.model, self._outputs)
        if self.recipe.from_maps:
            self.teacher = MapTeacher(self.network.backbone)

    def _prepare(self, image: Tensor) -> Tensor:
        images, _ = self.network.transform([self._unit(image)])
        height, width = images.image_sizes[0]
        content: Tensor = images.tensors[0, :, :height, :width]
        return content

    def _unit(self, image: Tensor) -> Tensor:
        return image.to(self.device, non_blocking=True).float() / 255

    def _outputs(self, images: Tensor) -> Tensor:
        """The last feature map, each channel relative to its variation within the image."""
        (last,) = self.network.backbone.maps(images)
        return relative_channels(last)

    def model_of(self, network: Any) -> Any:
        return network.backbone.model

    def learner(self, network: Any) -> DetectionLearner:
        return DetectionLearner(network)

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        indices = part.valid.nonzero()[:, 0].tolist() or [0]  # if no image could be read, one without weight
        images = [self._unit(part.images[i]) for i in indices]
        targets = [{name: value.to(self.device) for name, value in part.targets[i].items()} for i in indices]
        for target in targets:
            target["labels"] = target["labels"] + 1  # class 0 of the detector is the background
        transformed, targets = self.network.transform(images, targets)
        with accelerator.autocast():
            layout = self.model.layout(transformed.tensors, learn=True)
            expected = None if self.teacher is None else self.teacher(transformed.tensors)
            loss = learner(transformed, targets, layout, expected)
        if expected is None:
            per_image = loss.expand(len(part))
        else:
            per_image = loss.new_zeros(len(part)).index_copy(0, torch.tensor(indices, device=loss.device), loss)
        tokens = dict(zip(indices, layout.seqlens, strict=True))
        return Losses(per_image, layout.keep_ratio, [tokens.get(i, 0) for i in range(len(part))])

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        return score_detector(learner, network, batches, accelerator)

    def speedup(self, accelerator: Any, most: int, progress: Progress = silent) -> Ratio:
        return step_speedup(self, min(most, 2), accelerator, progress)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        save(folder, self.model, "detection", self.classes, self.options, weights)


@torch.no_grad()
def score_detector(learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
    """Compute COCO's average precision of a detector.

    Args:
        learner: The `DetectionLearner` that is run.
        network: The detector inside the learner.
        batches: Batches of the images of this process.
        accelerator: accelerate's Accelerator, for the device and the type to compute in.

    Returns:
        Metrics over the images of all processes: ``map``, ``map_50``, ``map_75``, and ``mask_map`` of a detector with
        masks; ``kept``, tokens over those of the uniform model, and ``kept_content``, the same without padding; for a
        scorer with two passes ``read``, the tokens of both passes over those of the uniform model.

    Raises:
        ImportError: If faster-coco-eval is not installed.
    """
    try:
        import faster_coco_eval  # noqa: F401
        from accelerate.utils import gather_object
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError:
        raise ImportError("average precision needs faster-coco-eval: pip install 'aptvit[dense]'") from None
    masks = network.roi_heads.has_mask()
    results: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    kept = KeptTokens(network.backbone.model, accelerator.device)
    was_training = learner.training
    learner.eval()
    for batch in batches:
        images = [image.to(accelerator.device).float() / 255 for image in batch.images]
        transformed, _ = network.transform(images)
        layout = network.backbone.model.layout(transformed.tensors)
        with accelerator.autocast():
            detections = learner(transformed, None, layout)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        detections = network.transform.postprocess(detections, transformed.image_sizes, sizes)
        for i in batch.valid.nonzero()[:, 0].tolist():
            prediction = {name: detections[i][name].float().cpu() for name in ("boxes", "scores")}
            prediction["labels"] = detections[i]["labels"].cpu() - 1
            target = dict(batch.targets[i])
            if masks:
                prediction["masks"] = detections[i]["masks"][:, 0].cpu() >= 0.5
                target["masks"] = target["masks"].bool()
            results.append((prediction, target))
        kept.add(layout, transformed.image_sizes, len(images), len(images))
    learner.train(was_training)
    # Gathered before the metric, which would need the same number of images in each process.
    metric: Any = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox", backend="faster_coco_eval", sync_on_compute=False
    )
    metric.warn_on_many_detections = False
    for prediction, target in gather_object(results):
        metric.update([prediction], [target])
    values = metric.compute()
    prefix = "bbox_" if masks else ""
    scores = {name: float(values[prefix + name]) for name in ("map", "map_50", "map_75")}
    if masks:
        scores["mask_map"] = float(values["segm_map"])
    return {**scores, **{name: float(mean.compute()) for name, mean in kept.means.items()}}
