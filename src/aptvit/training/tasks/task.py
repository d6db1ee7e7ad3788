"""The interface between the loop in `trainer.py` and the tasks: the loop handles no classes, boxes or pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from aptvit.measuring.rounds import Ratio
from aptvit.scorers.spread import Answers
from aptvit.training.data import Batch

__all__ = ["Losses", "Samples", "Task"]


@dataclass(frozen=True)
class Losses:
    """Losses of a part of a batch.

    Attributes:
        each: (B,) loss of each image.
        kept: Share of the patch tokens that these images kept.
        tokens: Number of tokens of each; None where all have the same.
    """

    each: Tensor
    kept: float = 1.0
    tokens: Sequence[int] | None = None


class Samples(Protocol):
    """A few hundred of the training images on the training device, the same on all processes; read repeatedly."""

    def trained(self, epoch: int = 0) -> Iterable[Any]:
        """The first images of an epoch, as they are trained on."""

    def plain(self, most: int = 512) -> Iterable[Any]:
        """Images spread over all, as they are evaluated; never the evaluation images themselves."""


class Task(Protocol):
    """What is trained, and on what.

    Attributes:
        network: The module that is trained, averaged and saved.
        model: The model inside it whose tokens are chosen: adaptive, or what it is compared with.
        new_head: Whether the model's own classifier is new.
        images: To train on, by `Draw`.
        evaluation: To evaluate on, or None.
        samples: For calibration, and for scorers that are trained.
        interpolate: How far at most from the initial to the trained weights the final ones are, see
            `DistillationRecipe`; 0 for the trained ones.
        evaluated_at_once: Images of a batch in evaluation, at most.
        uniform_answers: Outputs of the network that the training starts from, at each place, with nothing merged, see
            `aptvit.fit_spread`; None where there is no such network.
    """

    network: Any
    model: Any
    new_head: bool
    images: Any
    evaluation: Any
    interpolate: float
    evaluated_at_once: int
    uniform_answers: Answers | None

    @property
    def samples(self) -> Samples: ...

    def start_from(self, folder: Path | None) -> None:
        """Take the weights of an earlier training, if there is one.

        Raises:
            ValueError: If the task needs one and there is none, or the other way round, or the weights do not fit.
        """

    def model_in(self, network: Any) -> Any:
        """The model whose tokens are chosen, in a network like this task's, such as an average of its weights."""

    def learner(self, network: Any) -> nn.Module:
        """A module whose forward pass computes all that losses and scores need."""

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        """The losses to minimise."""

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """Metrics over the images of all processes; ``kept`` is the share of the tokens."""

    def speedup(self, accelerator: Any) -> Ratio:
        """How many times as fast a step is as the uniform model's, measured on the first images."""

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the network with these weights, so that a user can load it."""
