"""The interface between the training loop and the tasks: classes, boxes and pixels are handled by the tasks only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import Ratio
from aptvit.scorers.sizes import Answers
from aptvit.training.data import Batch
from aptvit.training.samples import Repeatable

__all__ = ["Losses", "Samples", "Task"]


@dataclass(frozen=True)
class Losses:
    """Losses of a part of a batch.

    Attributes:
        per_image: (B,) loss of each image.
        kept: Share of the patch tokens that the images keep.
        tokens: Number of tokens of each image; None if all images have the same number.
    """

    per_image: Tensor
    kept: float = 1.0
    tokens: Sequence[int] | None = None


class Samples(Protocol):
    """A sample of the training images on the training device, the same on all processes, to read repeatedly."""

    def augmented(self, epoch: int = 0) -> Repeatable:
        """Return batches of the first images of an epoch, augmented as in training."""

    def plain(self, most: int = 512) -> Repeatable:
        """Return batches of at most ``most`` images, spread evenly over all, transformed as in evaluation."""


class Task(Protocol):
    """A network with its images, losses and metrics.

    Attributes:
        network: The module that is trained, averaged and saved.
        model: The pretrained model inside the network: adaptive, or a baseline.
        new_head: Whether the classifier of the model is new.
        classes: Names of the classes of the images; empty without labels.
        note: A line about the network for the user; empty for none.
        images: Dataset to train on, indexed by `Draw`.
        evaluation: Dataset to evaluate on, or None.
        samples: Training images for calibration, and to train scorers.
        interpolate: Largest fraction of the interpolation between initial and trained weights, see
            `DistillationRecipe`; 0 keeps the trained weights.
        evaluation_batch_size: Largest number of images of a batch in evaluation.
        uniform_outputs: Computes the outputs, at each place of an image, of the network that the training starts from,
            with merging disabled, see `aptvit.fit_spread`; None if there is no such network.
    """

    network: Any
    model: Any
    new_head: bool
    note: str
    images: Any
    evaluation: Any
    interpolate: float
    evaluation_batch_size: int
    uniform_outputs: Answers | None

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def samples(self) -> Samples: ...

    def start_from(self, folder: Path | None) -> None:
        """Load the weights of an earlier training.

        Args:
            folder: Folder of the training, or None.

        Raises:
            ValueError: If the task needs a training and there is none, the task cannot start from a training, or the
                weights do not fit.
        """

    def model_of(self, network: Any) -> Any:
        """Return the pretrained model inside a network like that of the task, such as its moving average."""

    def learner(self, network: Any) -> nn.Module:
        """Return a module that runs the network and returns all outputs that losses and metrics need."""

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        """Compute the losses of a part of a batch.

        Args:
            learner: The module from `learner`, distributed over processes.
            part: The images.
            accelerator: accelerate's Accelerator, for the type to compute in.
        """

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """Compute metrics over the images of all processes; ``kept`` is the share of the tokens."""

    def speedup(self, accelerator: Any, most: int, progress: Progress = silent) -> Ratio:
        """Measure the speed-up of a training step over the uniform model, on at most ``most`` of the first images."""

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the network with these weights to a folder, in a form that users can load."""
