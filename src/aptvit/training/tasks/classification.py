"""Classification, trained on labels or by distillation of the uniform model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aptvit.datasets.sources import Source
from aptvit.hosts.pretrained import Host
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.models.checkpoints import is_new, save
from aptvit.scorers.sizes import Answers
from aptvit.storage.writing import save_weights
from aptvit.training.data import Batch, DeviceAugmentation, ImageDataset
from aptvit.training.evaluation import score_model
from aptvit.training.heads import describe_head, fit_head
from aptvit.training.methods import build_model, set_drop_path
from aptvit.training.objectives import Learner, block_depths, distillation_loss, label_loss
from aptvit.training.recipes.classification import ClassificationRecipe
from aptvit.training.recipes.distillation import DistillationRecipe
from aptvit.training.samples import ImageSamples
from aptvit.training.speed import training_speedup
from aptvit.training.tasks.task import Losses

__all__ = ["ClassTask"]

_MOST_LOGITS = 50_000_000  # of the teacher that are kept


class ClassTask:
    """Classification or distillation. Implements `aptvit.training.tasks.task.Task`; arguments as for `make_task`."""

    uniform_outputs: Answers | None = None

    def __init__(
        self,
        recipe: ClassificationRecipe | DistillationRecipe,
        host: Host,
        images: Source,
        evaluation: Source | None,
        device: torch.device,
    ) -> None:
        self.recipe, self.host, self.device = recipe, host, device
        distillation = recipe if isinstance(recipe, DistillationRecipe) else None
        self.distillation = distillation
        self.interpolate = 0.0 if distillation is None else distillation.interpolate
        self.classes = list(images.classes) if distillation is None else []
        num_classes = len(self.classes)
        self.teacher = None if distillation is None else self._make_teacher(distillation)
        self._logits: dict[int, Tensor] = {}  # of the teacher, by number of the validation image
        vit: Any = host.model
        head = "kept" if distillation is not None else fit_head(vit, self.classes)
        self.new_head, self.note = head == "new", describe_head(head, self.classes)
        set_drop_path(vit, recipe.drop_path)
        self.model: Any = build_model(vit, recipe)
        if host.adaptive is not None:  # its weights beside those of the uniform model
            new = {name: value for name, value in host.adaptive.state_dict().items() if is_new(name)}
            self.model.load_state_dict(new, strict=False)
        self.network = self.model
        self.depths = [] if distillation is None else block_depths(self.model, distillation)
        if self.depths and not isinstance(self.model, AdaptivePatchTransformer):
            raise ValueError(f"method={recipe.method} has no feature maps to compare: --set features_weight=0")
        self.model.to(device)
        labelled = distillation is None
        self.images = ImageDataset(images, host.data, recipe, labelled)
        self.evaluation = None if evaluation is None else ImageDataset(evaluation, host.data, labelled=labelled)
        self.evaluation_batch_size = min(recipe.micro_batch_size or 32, 64)
        self.augment = DeviceAugmentation(host.data, recipe, num_classes, device)
        plain = ImageDataset(images, host.data)
        self.samples = ImageSamples(self.images, plain, self.augment, recipe.seed, recipe.workers)

    def _make_teacher(self, recipe: DistillationRecipe) -> Learner:
        if self.host.model.num_classes == 0 or self.host.weights == "random":
            raise ValueError(
                "the uniform model is the teacher, so it needs trained weights and classes: give --checkpoint"
            )
        vit = copy.deepcopy(self.host.model).eval().requires_grad_(False).to(self.device)
        return Learner(vit, block_depths(vit, recipe), with_features=True)

    def start_from(self, folder: Path | None) -> None:
        if folder is not None:
            raise ValueError(f"a classifier cannot start from a training: leave out {folder}")

    def model_of(self, network: Any) -> Any:
        return network

    def learner(self, network: Any) -> Learner:
        return (
            Learner(network, self.depths, self.distillation is not None)
            if network is self.network
            else Learner(network)
        )

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        images, targets = self.augment(part)
        with accelerator.autocast():
            is_adaptive = isinstance(self.model, AdaptivePatchTransformer)
            layout = self.model.layout(images, learn=True) if is_adaptive else None
            tokens = (1.0, None) if layout is None else (layout.keep_ratio, layout.seqlens)
            outputs = learner(images, layout)
            if self.teacher is None or self.distillation is None:
                assert targets is not None
                return Losses(label_loss(outputs.logits, targets), *tokens)
            with torch.no_grad():
                expected = self.teacher(images)
            return Losses(distillation_loss(outputs, expected, self.distillation), *tokens)

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        teacher = None if self.teacher is None else self._expected
        return score_model(learner, network, batches, self.augment, teacher, accelerator)

    def _expected(self, batch: Batch, images: Tensor) -> Tensor:
        """Logits of the teacher for validation images; a training asks for them many times, and they stay the same."""
        assert self.teacher is not None and self.evaluation is not None
        numbers = batch.index.tolist()
        if self._logits.keys() >= set(numbers):
            return torch.stack([self._logits[number] for number in numbers])
        logits: Tensor = self.teacher(images).logits
        if len(self.evaluation) * logits.shape[1] <= _MOST_LOGITS:
            self._logits.update(zip(numbers, logits, strict=True))
        return logits

    def speedup(self, accelerator: Any, most: int, progress: Progress = silent) -> Ratio:
        images = next(iter(self.samples.augmented()))[: min(most, 16)]
        uniform, model = self.host.model, self.model

        def loss(network: Any) -> Tensor:
            value: Tensor = network(images).float().square().mean()
            return value

        return training_speedup(lambda: loss(uniform), lambda: loss(model), (uniform, model), accelerator, progress)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if isinstance(self.model, AdaptivePatchTransformer):
            save(self.model, folder, weights)
        else:
            save_weights(weights, folder / "model.safetensors")
