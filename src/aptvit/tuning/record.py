"""What was measured in a search: a row for each method, share and number of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from aptvit.evaluation.statistics import Interval, bootstrap_mean
from aptvit.measuring.record import Measurement, Record
from aptvit.measuring.rounds import Ratio
from aptvit.tuning.space import Candidate

__all__ = ["Trial", "TrialRecord"]


@dataclass(frozen=True)
class Trial(Measurement):
    """One candidate at one share of the tokens.

    Attributes:
        candidate: The method.
        share: Share of the tokens.
        images: Number of images whose outputs are compared; 0 for a trial of cost alone.
        rounds: Rounds of timing; 0 for none.
        held_out: Whether the images are those that the search does not see.
        setting: Setting of the method, in words.
        tokens: Tokens that enter a block over those of the uniform model: mean over blocks and images.
        gflops: Billions of operations per image; a multiplication and an addition are two.
        gflops_uniform: The same for the uniform model.
        seconds: Seconds of each round.
        seconds_uniform: The same for the uniform model in the same rounds.
        agreements: For each image whether the top-1 class is the uniform model's, or the cosine of embeddings.
        distances: For each image the Kullback-Leibler divergence of the classes from the uniform model's, or one minus
            the cosine of embeddings.
    """

    identity: ClassVar[tuple[str, ...]] = ("candidate", "share", "images", "rounds", "held_out")

    candidate: Candidate
    share: float
    images: int
    rounds: int
    held_out: bool = False
    setting: str = ""
    tokens: float = 0.0
    gflops: float = 0.0
    gflops_uniform: float = 0.0
    seconds: tuple[float, ...] = ()
    seconds_uniform: tuple[float, ...] = ()
    agreements: tuple[float, ...] = ()
    distances: tuple[float, ...] = ()

    @property
    def time(self) -> Ratio:
        """Time relative to the uniform model, over the rounds; without rounds, operations relative to it."""
        if not self.seconds:
            return Ratio(*[self.gflops / self.gflops_uniform] * 3)
        return Ratio.of_rounds(self.seconds, self.seconds_uniform)

    @property
    def agreement(self) -> Interval:
        """Mean agreement, with its interval over images."""
        return bootstrap_mean(np.array(self.agreements))

    @property
    def distance(self) -> Interval:
        """Mean distance, with its interval over images."""
        return bootstrap_mean(np.array(self.distances))

    def nearer_than(self, other: Trial) -> Interval:
        """Mean distance of another trial minus this one's, image by image, with its interval over images."""
        return bootstrap_mean(np.array(other.distances) - np.array(self.distances))


class TrialRecord(Record[Trial]):
    """The trials of one search."""

    row_type = Trial
    contents = "a search of aptvit tune"
