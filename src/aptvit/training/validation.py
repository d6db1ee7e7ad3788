"""Scores of a training on its validation images, and the weights that agree best there."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from aptvit.training.data import Batch, make_loader
from aptvit.training.log import RunLog
from aptvit.training.methods import Shares
from aptvit.training.processes import Processes
from aptvit.training.recipes.common import Recipe
from aptvit.training.sampler import FILLER, Draw
from aptvit.training.stopping import Stopped
from aptvit.training.tasks.task import Task

__all__ = ["Validation"]

_STEPS = 4  # between the initial weights and the farthest that are tried


class Validation:
    """Scores the network of a training at each share of the tokens, with thresholds calibrated on plain images.

    Args:
        task: The task, with the network and the images.
        recipe: The recipe.
        shares: Shares of the tokens of the training.
        processes: The processes of the training.
        stop_requested: Whether the training should stop, asked between batches.
    """

    def __init__(
        self, task: Task, recipe: Recipe, shares: Shares, processes: Processes, stop_requested: Callable[[], bool]
    ) -> None:
        self.task, self.recipe, self.shares, self.processes = task, recipe, shares, processes
        self._stop_requested = stop_requested

    def evaluate(
        self, learner: Any, averaged: Any | None, update: int, log: RunLog, evaluated: Container[float] = ()
    ) -> None:
        """Evaluate each share of the tokens, and write the scores to the log.

        Args:
            learner: The distributed learner of the network.
            averaged: The network with averaged weights; None without.
            update: Number of updates so far.
            log: The log.
            evaluated: Shares that are left out.

        Raises:
            Stopped: If the training should stop.
        """
        shares = [share for share in self.shares.in_use if share not in evaluated]
        if self.task.evaluation is None or not shares:
            return
        training_thresholds, self.shares.thresholds = self.shares.thresholds, self.plain_thresholds()
        for share in shares:
            self.shares.set(share)
            values = self.score(learner, self.task.network, log)
            if averaged is not None:
                averaged_shares = Shares(self.task.model_of(averaged), self.recipe)
                averaged_shares.thresholds = self.shares.thresholds
                averaged_shares.set(share)
                averaged_values = self.score(self.task.learner(averaged), averaged, log)
                values |= {f"ema_{name}": value for name, value in averaged_values.items()}
            log.write(update, "eval", share=share, images=len(self.task.evaluation), **values)
            text = ", ".join(f"{name} {_percent(name, value)}" for name, value in values.items())
            log.print(f"after {update} updates: {text}")
        self.shares.thresholds = training_thresholds

    def interpolate(
        self, learner: Any, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor], update: int, log: RunLog
    ) -> None:
        """Interpolate between initial and trained weights, and keep those that agree best with the teacher.

        A training on few images can move too far from the initial weights. Agreement is the divergence on validation
        images, over all shares.

        Args:
            learner: The distributed learner of the network, whose weights are set.
            initial: State dict of the network before the training.
            trained: State dict after it.
            update: Number of updates so far.
            log: The log.

        Raises:
            Stopped: If the training should stop.
        """
        network = self.task.network
        parameters = {name for name, _ in network.named_parameters()}
        training_thresholds, self.shares.thresholds = self.shares.thresholds, self.plain_thresholds()
        divergences = {}
        for fraction in (self.task.interpolate * step / _STEPS for step in range(_STEPS + 1)):
            _set_interpolated(network, initial, trained, parameters, fraction)
            total = 0.0
            for share in self.shares.in_use:
                self.shares.set(share)
                total += self.score(learner, network, log)["divergence"]
            divergences[fraction] = total / len(self.shares.in_use)
        best = min(divergences, key=divergences.__getitem__)
        _set_interpolated(network, initial, trained, parameters, best)
        self.shares.thresholds = training_thresholds
        values = {f"divergence_{fraction:g}": value for fraction, value in divergences.items()}
        log.write(update, "interpolation", way=best, **values)
        log.print(f"weights at {best:.0%} between initial and trained weights agree best on validation images")

    def score(self, learner: Any, network: Any, log: RunLog) -> dict[str, float]:
        """Metrics of a network on the validation images, at the thresholds that are set.

        Args:
            learner: The learner of the network.
            network: The network.
            log: The log, which shows the progress.

        Raises:
            Stopped: If the training should stop.
        """
        batches = self._batches()
        loader = make_loader(self.task.evaluation, batches, self.recipe.workers)
        tracked = log.track(loader, "evaluation, batches", len(batches))
        return self.task.score(learner, network, self._until_stopped(tracked), self.processes.accelerator)

    def plain_thresholds(self) -> dict[float, tuple[float, ...]]:
        """Thresholds calibrated on images as in evaluation, because augmented images have different scores."""
        training_thresholds = self.shares.thresholds
        try:
            self.shares.thresholds = {}
            self.shares.calibrate(self.task.samples.plain())
            thresholds: dict[float, tuple[float, ...]] = self.processes.broadcast_value(self.shares.thresholds)
            return thresholds
        finally:
            self.shares.thresholds = training_thresholds

    def _batches(self) -> list[list[Draw]]:
        """Batches of the validation images of this process; all processes have the same number of batches."""
        size, world = self.task.evaluation_batch_size, self.processes.world
        draws = [Draw(i, 0) for i in range(self.processes.rank, len(self.task.evaluation), world)]
        draws += [FILLER] * (-(-len(self.task.evaluation) // world) - len(draws))
        return [draws[i : i + size] for i in range(0, len(draws), size)]

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._stop_requested():
                raise Stopped
            yield batch


def _set_interpolated(
    network: Any, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor], parameters: set[str], fraction: float
) -> None:
    mixed = {name: initial[name].to(trained[name]).lerp(trained[name], fraction) for name in parameters}
    network.load_state_dict({**trained, **mixed})


def _percent(name: str, value: float) -> str:
    return f"{value:.4f}" if "divergence" in name else f"{value:.1%}"
