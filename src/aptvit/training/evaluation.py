"""Metrics of a classifier during a training: accuracy, agreement with the teacher, and tokens kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.training.data import Batch, DeviceAugmentation

__all__ = ["score_model"]


@torch.no_grad()
def score_model(
    learner: nn.Module,
    model: Any,
    batches: Iterable[Batch],
    augment: DeviceAugmentation,
    teacher: Callable[[Batch, Tensor], Tensor] | None,
    accelerator: Any,
) -> dict[str, float]:
    """Compute the metrics of a model on images.

    Args:
        learner: The module whose forward pass is run, see `aptvit.training.objectives.Learner`.
        model: The model inside the learner.
        batches: Batches of the images of this process.
        augment: Normalises images; has a number of classes if the images have labels.
        teacher: Returns the logits of the uniform model for a batch and its normalised images; None if there is none to
            compare with.
        accelerator: accelerate's Accelerator, for the type to compute in.

    Returns:
        Metrics over the images of all processes: ``kept``, tokens over those of the uniform model; with labels ``top1``
        and, for more than five classes, ``top5``; with a teacher ``agreement``, the share of images with the same
        best class, and ``divergence``, the mean KL divergence in nats.

    Raises:
        ImportError: If torchmetrics is not installed.
    """
    metrics = _Metrics(augment.num_classes, model.num_classes, teacher is not None, augment.device)
    was_training = learner.training
    learner.eval()
    for batch in batches:
        images = augment.normalised(batch)
        valid = batch.valid.to(images.device)
        adaptive = isinstance(model, AdaptivePatchTransformer)
        layout = model.layout(images) if adaptive else None
        with accelerator.autocast():
            logits = learner(images, layout).logits.float()[valid]
            expected = None if teacher is None else teacher(batch, images).float()[valid]
        kept = layout.keep_ratio if layout is not None else _kept(model)
        metrics.add(logits, batch.targets.to(images.device)[valid], expected, kept, len(batch))
    learner.train(was_training)
    return metrics.values()


def _kept(model: Any) -> float:
    """Share of the tokens that blocks process, mean over blocks, for a model without layouts."""
    if not hasattr(model, "tokens_per_block"):
        return 1.0
    per_block = model.tokens_per_block()
    rows, cols = model.patch_embed.grid_size
    return sum(per_block) / len(per_block) / (rows * cols + model.num_prefix_tokens)


class _Metrics:
    """Metrics of `score_model`. They are torchmetrics, which sum over processes."""

    def __init__(self, has_labels: int, num_classes: int, has_teacher: bool, device: torch.device) -> None:
        try:
            from torchmetrics import MeanMetric
            from torchmetrics.classification import MulticlassAccuracy
        except ImportError:
            raise ImportError("training needs torchmetrics: pip install 'aptvit[train]'") from None
        self.metrics: dict[str, Any] = {"kept": MeanMetric()}
        if has_labels:
            self.metrics["top1"] = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            if num_classes > 5:
                self.metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5, validate_args=False)
        if has_teacher:
            self.metrics["agreement"] = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            self.metrics["divergence"] = MeanMetric()
        for metric in self.metrics.values():
            metric.to(device)

    def add(self, logits: Tensor, targets: Tensor, expected: Tensor | None, kept: float, number: int) -> None:
        self.metrics["kept"].update(kept, weight=number)
        if not len(logits):
            return
        for name in ("top1", "top5"):
            if name in self.metrics:
                self.metrics[name].update(logits, targets)
        if expected is not None:
            self.metrics["agreement"].update(logits, expected.argmax(1))
            log_probabilities = logits.log_softmax(1), expected.log_softmax(1)
            self.metrics["divergence"].update(F.kl_div(*log_probabilities, log_target=True, reduction="none").sum(1))

    def values(self) -> dict[str, float]:
        return {name: float(metric.compute()) for name, metric in self.metrics.items()}
