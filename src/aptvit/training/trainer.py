"""The training loop, from a recipe to a saved model; `Training.run` has the steps in order.

images ── read, augmented (workers) ── normalised, erased, mixed, scored (device) ── learner ── loss of the global batch

Everything that depends on the task is in an implementation of `aptvit.training.tasks.task.Task`.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from aptvit.hosts.pretrained import Host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.training.checkpoints import Checkpoint, newest_checkpoint, write_checkpoint
from aptvit.training.data import Batch, make_loader
from aptvit.training.heads import check_new_head
from aptvit.training.log import RunLog, RunningMeans, read_log
from aptvit.training.methods import Shares, settings_from
from aptvit.training.micro_batches import choose_micro_batch
from aptvit.training.optimization import choose_trained, make_optimizer, make_schedule, parameter_groups
from aptvit.training.page import write_page
from aptvit.training.processes import Processes
from aptvit.training.recipes.common import Recipe
from aptvit.training.sampler import FILLER, BalancedBatches, Draw
from aptvit.training.stopping import StopSignals
from aptvit.training.tasks.make_task import make_task

__all__ = ["Training"]

_SCORER_IMAGES = 2048  # largest number of images that a scorer is trained on
_LOG_EVERY = 10  # updates between lines of the log


class Training:
    """A training of a classifier, detector or segmenter.

    Args:
        recipe: Recipe of the task.
        host: The pretrained model; its weights are changed.
        images: Images to train on: a source, see `aptvit.training.find_sources`; or files with boxes or masks, see
            `aptvit.dense.find_boxes` and `aptvit.dense.find_masks`.
        evaluation: Images to evaluate on, of the same type; None evaluates nothing.
        run: Folder for checkpoints, log and the final model.
        start: Folder of the training of a detector or segmenter to take weights from.

    Raises:
        ValueError: If recipe, model and images do not fit together.
        ImportError: If a package that the training needs is not installed; the message names the extra.
    """

    def __init__(
        self, recipe: Recipe, host: Host, images: Any, evaluation: Any, run: Path, start: Path | None = None
    ) -> None:
        self.run_folder, self.processes = Path(run), Processes(recipe)
        workers = self.processes.workers(recipe.workers)
        recipe = replace(recipe, workers=workers, precision=self.processes.precision)
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        if host.adaptive is not None:
            recipe = settings_from(recipe, host.adaptive)
        self.recipe = recipe
        _seed(recipe.seed)  # new parameters are the same on all processes
        self.task = make_task(recipe, host, images, evaluation, self.processes.device)
        self.task.start_from(start)
        self.network, self.model = self.task.network, self.task.model
        self.shares = Shares(self.model, recipe)
        choose_trained(self.network, self.model, recipe, self.task.new_head)
        if recipe.checkpointing:
            self.model.set_grad_checkpointing()
        self.batches = BalancedBatches(
            len(images), recipe.batch_size, self.processes.rank, self.processes.world, recipe.seed
        )
        self.initial_weights = copy.deepcopy(self.network.state_dict()) if self.task.interpolate else None
        self.update = 0
        self.micro_batch_size = recipe.micro_batch_size or self._images_per_process
        self.seconds = 0.0  # of training, without evaluation and checkpoints
        self.speedup: dict[str, float] | None = None
        self.num_updates = len(self.batches) * recipe.epochs
        if recipe.max_steps:
            self.num_updates = min(self.num_updates, recipe.max_steps)
        if self.task.new_head:
            check_new_head(recipe, self.num_updates, len(self.task.classes))

    # From the first update to the saved model

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train, evaluate and write the model.

        Args:
            resume: Continue from the newest checkpoint in the folder, if there is one.

        Returns:
            ``finished``, whether all updates were made; ``updates``; ``seconds`` of training; ``speedup`` of a step
            over the uniform model, or None if it was not measured; ``evaluations``, the metrics of each evaluation and
            share of the tokens.

        Raises:
            ValueError: If the loss is not finite.
        """
        checkpoint = newest_checkpoint(self.run_folder) if resume else None
        if checkpoint is None:
            self._prepare_shares()
            micro_batch_note = self._choose_micro_batch()
            self._measure_speedup()
        else:
            self._load_weights(checkpoint)
        self._start(checkpoint)
        self.schedule: Any
        with (
            RunLog(self.run_folder, self.num_updates, self.update, quiet=not self.processes.is_first) as self.log,
            StopSignals() as self.stop,
        ):
            if checkpoint is None:
                self._log_notes(self.task.note, micro_batch_note)
                self._log_speedup()
                if self.num_updates:
                    self._evaluate()
                self._seed_process()
            pin = self.processes.device.type == "cuda"
            loader = make_loader(self.task.images, self.batches, self.recipe.workers, pin)
            for epoch in range(self.update // self.updates_per_epoch, self.recipe.epochs):
                if self.stop.requested or self._is_over():
                    break
                self._epoch(epoch, loader)
            del loader  # ends the worker processes
            if self.stop.requested:
                self.log.print(f"stopped after {self.update} updates: continue with the same command and --resume")
                return self._results(finished=False)
            self._interpolate()
            self._evaluate()
            self._finish()
        return self._results(finished=True)

    @property
    def updates_per_epoch(self) -> int:
        """Number of updates of an epoch; the last may have fewer images."""
        return -(-len(self.task.images) // self.recipe.batch_size)

    @property
    def _images_per_process(self) -> int:
        """Number of images of an update on this process; some processes may have one fewer."""
        return -(-self.recipe.batch_size // self.processes.world)

    def _seed_process(self) -> None:
        """Seed each process differently: from here on they draw different random numbers."""
        _seed(self.recipe.seed + 1 + self.processes.rank)

    def _start(self, checkpoint: Checkpoint | None) -> None:
        """Distribute the model, and create optimizer and schedule, with the state of an interrupted training."""
        processes, recipe = self.processes, self.recipe
        self.learner = processes.distribute(self.task.learner(self.network), self.model)
        if recipe.compile:
            self.model.compile()
        self.optimizer = make_optimizer(parameter_groups(self.network, self.model, recipe, self.task.new_head), recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.num_updates)
        self.stepper = processes.accelerator.prepare_optimizer(self.optimizer)
        self.ema = ModelEmaV3(self.network, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        if checkpoint is not None:
            self._load_optimizer(checkpoint)

    def _is_over(self) -> bool:
        limit = 60 * self.recipe.max_minutes
        is_late = bool(limit) and self.processes.broadcast_value(self.seconds >= limit)
        return self.update >= self.num_updates or is_late

    # Epochs and updates

    def _epoch(self, epoch: int, loader: Iterable[Batch]) -> None:
        self.batches.epoch, self.batches.start = epoch, self.update - epoch * self.updates_per_epoch
        costs: dict[int, float] = {}
        means = RunningMeans()
        self.learner.train()
        clock = time.perf_counter()
        for batch in loader:
            self._log_problems(batch)
            values = self._update(batch, costs)
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            means.add(values, len(batch) * self.processes.world)
            if self.update % _LOG_EVERY == 0 or self._is_over():
                self._log_updates(means)
                means = RunningMeans()
            stop = self._stop_requested()
            if stop or (self.recipe.save_every and self.update % self.recipe.save_every == 0):
                self._save()
                clock = time.perf_counter()
            if stop or self._is_over():
                break
            if self.recipe.recalibrate and self.update % self.recipe.recalibrate == 0:
                self._recalibrate()
        self._store_costs(costs)
        if not self.stop.requested:
            self._save()
            if self.recipe.eval_every and (epoch + 1) % self.recipe.eval_every == 0 and not self._is_over():
                self._evaluate()

    def _update(self, batch: Batch, costs: dict[int, float]) -> dict[str, Tensor]:
        """Make a step of the optimizer on the batch of all processes together.

        Args:
            batch: The part of the batch on this process.
            costs: Tokens by number of the image; those of the batch are added.

        Returns:
            Values for the log: ``loss``, ``kept`` and, with clipping, ``norm`` of the gradient.
        """
        recipe, processes = self.recipe, self.processes
        shares = self.shares.in_use
        self.shares.set(shares[self.update % len(shares)])
        self.schedule.step_update(self._progress())
        number = processes.sum(batch.valid.sum().to(processes.device, torch.float32)).clamp(min=1)
        # All processes need the same number of parts, because sharded parameters are gathered in each part.
        parts = batch.parts(-(-self._images_per_process // self.micro_batch_size))
        total, kept = torch.zeros((), device=processes.device), 0.0
        for i, part in enumerate(parts):
            with processes.without_sync(self.learner, is_last=i == len(parts) - 1):
                losses = self.task.losses(self.learner, part, processes.accelerator)
                # Gradients are averaged over processes; images have the same weight on all of them.
                loss = (losses.per_image * part.valid.to(losses.per_image.device)).sum() / number * processes.world
                processes.accelerator.backward(loss)
            total += loss.detach() / processes.world
            self.log.tick(self.update + (i + 1) / len(parts))
            kept += losses.kept / len(parts)
            if losses.tokens is not None:
                costs.update(zip(part.index.tolist(), losses.tokens, strict=True))
        norm = None
        if recipe.clip:
            norm = processes.accelerator.clip_grad_norm_(list(self.network.parameters()), recipe.clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.stepper.step()
        self.stepper.zero_grad()
        self.update += 1
        if self.ema is not None:
            self.ema.update(self.network, step=self.update)
        values = {"loss": processes.sum(total), "kept": torch.tensor(kept)}
        return values if norm is None else {**values, "norm": torch.as_tensor(norm)}

    def _progress(self) -> float:
        """Number of finished updates; with a time limit at least the number for the elapsed fraction of the time."""
        limit = 60 * self.recipe.max_minutes
        by_clock = self.num_updates * self.seconds / limit if limit else 0.0
        progress: float = self.processes.broadcast_value(max(self.update, by_clock)) if limit else self.update
        return min(progress, self.num_updates - 1)

    def _stop_requested(self) -> bool:
        """Whether any process received a request to stop."""
        if self.processes.world > 1:
            request = torch.tensor(float(self.stop.requested), device=self.processes.device)
            self.stop.requested = bool(self.processes.sum(request))
        return self.stop.requested

    def _store_costs(self, costs: dict[int, float]) -> None:
        """Gather the tokens of each image from all processes, to distribute the images of the next epoch evenly."""
        if not self.recipe.balance or self.processes.world == 1:
            return
        table = torch.zeros(2, len(self.task.images), device=self.processes.device)
        index = torch.tensor(list(costs), dtype=torch.long, device=table.device)
        table[0, index] = torch.tensor(list(costs.values()), dtype=torch.float32, device=table.device)
        table[1, index] = 1
        tokens, counts = self.processes.sum(table).cpu().numpy()
        counted = counts.nonzero()[0]
        self.batches.store_costs(counted, tokens[counted] / counts[counted])

    # Shares of the tokens

    def _prepare_shares(self) -> None:
        with torch.random.fork_rng():
            self.shares.prepare(
                self.task.samples.plain(_SCORER_IMAGES), self.task.samples.augmented(), self.task.uniform_outputs
            )
        self.processes.broadcast(self.network)
        self.shares.thresholds = self.processes.broadcast_value(self.shares.thresholds)

    def _recalibrate(self) -> None:
        """Calibrate the thresholds of the shares on augmented images of this epoch."""
        with torch.random.fork_rng():
            self.shares.calibrate(self.task.samples.augmented(self.update // self.updates_per_epoch))
        self.shares.thresholds = self.processes.broadcast_value(self.shares.thresholds)
        self.learner.train()

    def _choose_micro_batch(self) -> str:
        """Choose the number of images that run at a time, if the recipe leaves it open; returns a line about it."""
        processes = self.processes
        if self.recipe.micro_batch_size or not self.num_updates or processes.shard:
            return ""
        self.shares.set(self.shares.in_use[0])
        number, note = choose_micro_batch(self.task, self._images_per_process, processes.accelerator)
        self.micro_batch_size = processes.least(number)
        return note

    # Log and evaluation

    def _measure_speedup(self) -> None:
        """Time forward and backward passes of the uniform and of the trained model on the first images."""
        if (
            self.recipe.method == "uniform"
            or self.recipe.trains == "new"
            or not self.num_updates
            or self.processes.shard
        ):
            return
        self.shares.set(self.shares.in_use[0])
        self.speedup = asdict(self.task.speedup(self.processes.accelerator, self.micro_batch_size))

    def _log_notes(self, *notes: str) -> None:
        for note in filter(None, notes):
            self.log.write(0, "note", message=note)
            self.log.print(note)

    def _log_speedup(self) -> None:
        if self.speedup is not None:
            text = "{median:.2f} times as fast as uniform training ({least:.2f} to {most:.2f})".format(**self.speedup)
            self.log.write(0, "start", method=self.recipe.method, **self.speedup)
            self.log.print(f"{text}, forward and backward")

    def _log_updates(self, means: RunningMeans) -> None:
        values = means.values()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        values["lr"] = max(rates)
        self.log.write(self.update, "train", seconds=round(self.seconds, 3), **values)
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['kept']:.0%} of the tokens  "
        text += f"{values['images_per_second']:.1f} images/s"
        if self.speedup is not None:
            text += f"  {self.speedup['median']:.2f}x uniform"
        self.log.advance(self.update, text)
        if not math.isfinite(values["loss"]):
            raise ValueError(f"the loss is {values['loss']} after {self.update} updates: lower lr, or set clip=1")

    def _log_problems(self, batch: Batch) -> None:
        for problem in batch.problems:
            self.log.print(f"skipped: {problem}", style="yellow")
            self.log.write(self.update, "problem", message=problem)

    def _evaluate(self) -> None:
        """Evaluate each share of the tokens on the validation images."""
        if self.task.evaluation is None:
            return
        training_thresholds, self.shares.thresholds = self.shares.thresholds, self._plain_thresholds()
        for share in self.shares.in_use:
            self.shares.set(share)
            values = self._score(self.learner, self.network)
            if self.ema is not None and self.update:  # before the first update there is no average
                module: Any = self.ema.module
                averaged = Shares(self.task.model_of(module), self.recipe)
                averaged.thresholds = self.shares.thresholds
                averaged.set(share)
                averaged_values = self._score(self.task.learner(module), module)
                values |= {f"ema_{name}": value for name, value in averaged_values.items()}
            self.log.write(self.update, "eval", share=share, images=len(self.task.evaluation), **values)
            text = ", ".join(f"{name} {_percent(name, value)}" for name, value in values.items())
            self.log.print(f"after {self.update} updates: {text}")
        self.shares.thresholds = training_thresholds
        self.learner.train()

    def _interpolate(self) -> None:
        """Interpolate between initial and trained weights, and keep those that agree best with the teacher.

        A training on few images can move too far from the initial weights. Agreement is the divergence on validation
        images, over all shares.
        """
        if self.initial_weights is None or self.task.evaluation is None:
            return
        trained: Any = self.network if self.ema is None else self.ema.module
        trained_weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        self.ema = None  # the interpolated weights replace the average
        parameters = {name for name, _ in self.network.named_parameters()}
        training_thresholds, self.shares.thresholds = self.shares.thresholds, self._plain_thresholds()
        divergences = {}
        for fraction in (self.task.interpolate * step / 4 for step in range(5)):
            self._set_interpolated(self.initial_weights, trained_weights, parameters, fraction)
            total = 0.0
            for share in self.shares.in_use:
                self.shares.set(share)
                total += self._score(self.learner, self.network)["divergence"]
            divergences[fraction] = total / len(self.shares.in_use)
        best = min(divergences, key=divergences.__getitem__)
        self._set_interpolated(self.initial_weights, trained_weights, parameters, best)
        self.shares.thresholds = training_thresholds
        values = {f"divergence_{fraction:g}": value for fraction, value in divergences.items()}
        self.log.write(self.update, "interpolation", way=best, **values)
        self.log.print(f"weights at {best:.0%} between initial and trained weights agree best on validation images")

    def _set_interpolated(
        self, initial: dict[str, Tensor], trained: dict[str, Tensor], parameters: set[str], fraction: float
    ) -> None:
        mixed = {name: initial[name].to(trained[name]).lerp(trained[name], fraction) for name in parameters}
        self.network.load_state_dict({**trained, **mixed})

    def _score(self, learner: Any, network: Any) -> dict[str, float]:
        batches = self._evaluation_batches()
        loader = make_loader(self.task.evaluation, batches, self.recipe.workers)
        tracked = self.log.track(loader, "evaluation, batches", len(batches))
        return self.task.score(learner, network, tracked, self.processes.accelerator)

    def _evaluation_batches(self) -> list[list[Draw]]:
        """Batches of the validation images of this process; all processes have the same number of batches."""
        size, world = self.task.evaluation_batch_size, self.processes.world
        draws = [Draw(i, 0) for i in range(self.processes.rank, len(self.task.evaluation), world)]
        draws += [FILLER] * (-(-len(self.task.evaluation) // world) - len(draws))
        return [draws[i : i + size] for i in range(0, len(draws), size)]

    def _plain_thresholds(self) -> dict[float, tuple[float, ...]]:
        """Calibrate thresholds on images as in evaluation, because augmented images have different scores."""
        training_thresholds = self.shares.thresholds
        try:
            self.shares.thresholds = {}
            self.shares.calibrate(self.task.samples.plain())
            thresholds: dict[float, tuple[float, ...]] = self.processes.broadcast_value(self.shares.thresholds)
            return thresholds
        finally:
            self.shares.thresholds = training_thresholds

    def _results(self, finished: bool) -> dict[str, Any]:
        evaluations = [line for line in read_log(self.run_folder) if line["what"] == "eval"]
        return {
            "finished": finished,
            "updates": self.update,
            "seconds": self.seconds,
            "speedup": self.speedup,
            "evaluations": evaluations,
        }

    # Files

    def _save(self) -> None:
        """Write a checkpoint. If it cannot be written, for example on a full disk, the training continues."""
        processes = self.processes
        checkpoint = Checkpoint(
            self.update,
            processes.weights(self.network),
            None if self.ema is None else processes.weights(self.ema.module),
            {
                "optimizer": processes.optimizer_state(self.optimizer),
                "scaler": processes.accelerator.scaler.state_dict() if processes.accelerator.scaler else None,
                "random": processes.random_states(),
                "seconds": self.seconds,
                "thresholds": self.shares.thresholds,
                "costs": torch.from_numpy(self.batches.costs),
                "speedup": self.speedup,
                "drawn": getattr(self.model, "num_batches", None),
                "micro_batch_size": self.micro_batch_size,
                "recipe": self.recipe.to_yaml(),
            },
        )
        if processes.is_first:
            try:
                write_checkpoint(self.run_folder, checkpoint, self.recipe.keep_checkpoints)
            except OSError as error:
                self.log.print(f"no checkpoint after {self.update} updates: {error}", style="yellow")
                self.log.write(self.update, "problem", message=str(error))
        processes.wait()

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        """Load the state that is needed before the model is distributed over processes."""
        self.network.load_state_dict(checkpoint.weights)
        self.update, self.seconds = checkpoint.update, checkpoint.state["seconds"]
        self.shares.thresholds = checkpoint.state["thresholds"]
        self.batches.costs = checkpoint.state["costs"].numpy()
        self.speedup = checkpoint.state["speedup"]
        # The same parts as before, because their number changes the rounding; 0.1 ran all images at once.
        self.micro_batch_size = checkpoint.state.get("micro_batch_size", self.micro_batch_size)
        if checkpoint.state["drawn"] is not None:
            self.model.num_batches = checkpoint.state["drawn"]

    def _load_optimizer(self, checkpoint: Checkpoint) -> None:
        processes = self.processes
        processes.load_optimizer_state(self.optimizer, checkpoint.state["optimizer"])
        if self.ema is not None and checkpoint.ema is not None:
            self.ema.module.load_state_dict(checkpoint.ema)
        if processes.accelerator.scaler and checkpoint.state["scaler"]:
            processes.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        processes.load_random_states(checkpoint.state["random"])

    def _finish(self) -> None:
        """Write the model, the results and the page; with averaged weights if there are any, and plain thresholds."""
        self.shares.thresholds = self._plain_thresholds()
        self.shares.set(self.recipe.keep)
        weights = self.processes.weights(self.network if self.ema is None else self.ema.module)
        if self.processes.is_first:
            folder = self.run_folder / "model"
            folder.mkdir(parents=True, exist_ok=True)
            self.task.save(folder, weights)
            (self.run_folder / "results.json").write_text(json.dumps(self._results(finished=True), indent=2) + "\n")
            write_page(self.run_folder, self.recipe)
        self.processes.wait()


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _percent(name: str, value: float) -> str:
    return f"{value:.4f}" if "divergence" in name else f"{value:.1%}"
