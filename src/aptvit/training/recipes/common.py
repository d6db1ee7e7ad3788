"""Settings of all tasks, and the checks that all recipes share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal

import yaml

from aptvit.patching.budget import MAX_SCALES

__all__ = ["Precision", "Recipe", "check_fractions", "check_positive"]

_MAX_WORKERS, _MAX_SEED = 1024, 2**32 - 1  # numpy takes no larger seed

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of all tasks. A training needs the recipe of its task, of a class derived from this one.

    The YAML files in ``aptvit/training/recipes`` explain the published values.

    Attributes:
        method: ``"apt"``, or a baseline.
        trains: The parameters that are trained.
        keep: Share of the patch tokens to keep.
        keep_also: Further shares that are trained in turn with ``keep``, so that the model supports all of them.
        per_image: Every image keeps the share. Otherwise the average does, by thresholds that are calibrated on the
            training images.
        blend: With thresholds: from 0, the number of tokens of an image is that of the thresholds, to 1, it is the
            share, see `aptvit.patching.budget.Budget`.
        thresholds: Thresholds to use instead of a share, from fine to coarse.
        scales: Number of patch sizes, the base size included, where no thresholds are set.
        scorer: Scorer of patches, as for `aptvit.adapt`.
        init: Initialisation of the sub-patch branch (Table 7b).
        resize_only: Whether to leave out the sub-patch branch.
        area_bias: Factor of the logarithm of a patch's area in the bias of its key, as for `aptvit.adapt`.
        reading: How coarse patches are read, as for `aptvit.adapt`.
        recalibrate: Updates between two calibrations of the thresholds; 0 calibrates once, at the start.
        epochs: Number of passes over the images. With 0 no update is made: the scorer is trained, thresholds are
            calibrated, and the network is evaluated and written.
        max_steps: Largest number of updates; 0 for no limit.
        max_minutes: Largest number of minutes of training, which the schedule follows instead of ``epochs``; 0 for no
            limit.
        batch_size: Number of images of an update, on all processes together.
        micro_batch_size: Number of images that a process runs at a time; an update sums their gradients. 0 for as many
            as fit into the memory, measured before the training; with ``shard`` for all.
        optimizer: Name of a timm optimizer.
        lr: Peak learning rate, for ``lr_batch`` images.
        lr_batch: Batch size that ``lr`` is for: the rate is multiplied with ``batch_size / lr_batch``. 0 for any size.
        min_lr: Final learning rate of the cosine schedule, as a fraction of the peak.
        warmup: Fraction of the updates in which the learning rate rises.
        weight_decay: Weight decay of matrices; biases, norms and positions have none.
        betas: The two betas of Adam.
        layer_decay: Factor between the learning rates of a layer and of the layer above.
        new_lr: Factor for the learning rate of new parameters, and of a new classifier, in place of layer decay.
        clip: Largest norm of the gradient; 0 for no limit.
        ema: Decay of a moving average of the weights; 0 for none.
        drop_path: Rate of stochastic depth in the last block.
        flip: Probability of mirroring an image.
        precision: Floating-point type to compute in; weights stay in float32. ``"auto"`` is bfloat16 on hardware that
            computes in it, otherwise float32.
        checkpointing: Whether to recompute activations in the backward pass.
        compile: Whether to compile the blocks.
        shard: Whether to shard parameters over the processes (FSDP2) instead of copying them (DDP).
        balance: Whether to distribute images such that all processes have about the same number of tokens.
        workers: Number of processes that read images, for each process that trains; -1 for a number that fits the CPUs.
        seed: Seed of everything random.
        save_every: Updates between checkpoints; 0 for the end of each epoch only.
        keep_checkpoints: Number of checkpoints to keep.
        eval_every: Epochs between evaluations; 0 for the end only.
        hold_back: Fraction of the training images kept for validation, if the data has no evaluation split.

    Raises:
        ValueError: If a value is out of range, or two values contradict each other.
    """

    task: ClassVar[str] = "any"
    """Name of the task, for messages."""

    method: str = "apt"
    trains: str = "all"
    keep: float = 0.5
    keep_also: tuple[float, ...] = ()
    per_image: bool = False
    blend: float = 0.0
    thresholds: tuple[float, ...] = ()
    scales: int = 2
    scorer: str = "entropy"
    init: Literal["zero", "residual", "nonzero"] = "zero"
    resize_only: bool = False
    area_bias: float = 0.0
    reading: Literal["resized", "corner"] = "resized"
    recalibrate: int = 0
    epochs: int = 1
    max_steps: int = 0
    max_minutes: float = 0.0
    batch_size: int = 256
    micro_batch_size: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-5
    lr_batch: int = 0
    min_lr: float = 0.0
    warmup: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    layer_decay: float = 1.0
    new_lr: float = 1.0
    clip: float = 0.0
    ema: float = 0.0
    drop_path: float = 0.0
    flip: float = 0.0
    precision: Precision = "float32"
    checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    balance: bool = True
    workers: int = -1
    seed: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    eval_every: int = 1
    hold_back: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < (-1 if field.name == "workers" else 0):
                raise ValueError(f"{field.name}={value:g} must not be negative")
        check_positive(self, ("keep", "lr", "batch_size", "scales", "layer_decay", "keep_checkpoints"))
        check_fractions(self, ("keep", "hold_back", "flip", "warmup", "drop_path", "min_lr", "ema", "blend"))
        for name, most in (("scales", MAX_SCALES), ("workers", _MAX_WORKERS), ("seed", _MAX_SEED)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name):g} must be at most {most:,}")
        if not self.optimizer.replace("_", "").isalnum():
            raise ValueError(
                f"optimizer={self.optimizer!r} must be the name of an optimizer of timm, such as adamw"[:200]
            )
        for share in self.keep_also:
            if not 0 < share <= 1:
                raise ValueError(f"keep_also={share:g} must be above 0 and at most 1")
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers")
        if self.thresholds and (self.per_image or self.keep_also or self.recalibrate):
            raise ValueError("thresholds are set: leave out per_image, keep_also and recalibrate, or the thresholds")
        if self.blend and (self.per_image or self.thresholds):
            raise ValueError(f"blend={self.blend:g} calibrates thresholds: with per_image or thresholds, set blend=0")
        if self.recalibrate and self.per_image:
            raise ValueError("recalibrate calibrates thresholds, and per_image has none: leave out one of them")

    @property
    def shares(self) -> tuple[float, ...]:
        """All shares of the tokens that are trained, ``keep`` first."""
        return (self.keep, *(share for share in self.keep_also if share != self.keep))

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up, scaled to the batch size."""
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1.0)

    def to_yaml(self) -> str:
        """Return all settings as YAML, for `aptvit.training.load_recipe`."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def check_fractions(recipe: Recipe, names: Iterable[str]) -> None:
    """Raise ValueError unless these settings are between 0 and 1."""
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name}={getattr(recipe, name):g} must be between 0 and 1")


def check_positive(recipe: Recipe, names: Iterable[str]) -> None:
    """Raise ValueError unless these settings are above 0."""
    for name in names:
        if getattr(recipe, name) <= 0:
            raise ValueError(f"{name}={getattr(recipe, name):g} must be above 0")
