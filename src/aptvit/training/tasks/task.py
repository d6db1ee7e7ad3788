"""What a training learns, as the loop in `trainer.py` sees it: it knows nothing of classes, boxes or pixels."""

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
    """What a model makes of some images.

    Attributes:
        each: (B,) loss of each image.
        kept: Share of the patch tokens that they kept.
        tokens: How many each kept; None where all have as many.
    """

    each: Tensor
    kept: float = 1.0
    tokens: Sequence[int] | None = None


class Samples(Protocol):
    """A few hundred of the training images on the training device, the same on all processes, again and again."""

    def trained(self, epoch: int = 0) -> Iterable[Any]:
        """The first images of an epoch, as they are trained on."""

    def plain(self, most: int = 512) -> Iterable[Any]:
        """Images spread over all, as evaluation shows them. Not those evaluated: what is judged must not choose."""


class Task(Protocol):
    """What is learned, and from what.

    Attributes:
        network: All that is trained, averaged and saved.
        model: The model inside it whose tokens are chosen: adaptive, or what it is compared with.
        new_head: Whether the model's own classifier starts anew.
        images: To train on, by `Draw`.
        evaluation: To evaluate on, or None.
        samples: To find thresholds on, and to teach scorers.
        evaluated_at_once: Images of a batch in evaluation, at most.
        uniform_answers: What the network that the training starts from says of each place with nothing merged, see
            `aptvit.fit_spread`; None where there is no such network.
    """

    network: Any
    model: Any
    new_head: bool
    images: Any
    evaluation: Any
    evaluated_at_once: int
    uniform_answers: Answers | None

    @property
    def samples(self) -> Samples: ...

    def start_from(self, folder: Path) -> None:
        """Take the weights of an earlier training."""

    def model_in(self, network: Any) -> Any:
        """The model whose tokens are chosen, in a network like this task's, such as an average of its weights."""

    def learner(self, network: Any) -> nn.Module:
        """What computes, in one forward pass, all that losses and scores need."""

    def losses(self, learner: nn.Module, part: Batch, accelerator: Any) -> Losses:
        """What is to become small."""

    def score(self, learner: nn.Module, network: Any, batches: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """How good it is, over the images of all processes; ``kept`` is the share of the tokens."""

    def speedup(self, accelerator: Any) -> Ratio:
        """How many times as fast as the uniform model it learns, measured on the first images."""

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the network with these weights, so that a user can load it."""
