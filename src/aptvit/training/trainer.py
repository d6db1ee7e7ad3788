"""The training loop, from a recipe to a saved model; `Training.run` has the steps in order.

images ── read, augmented (workers) ── normalised, erased, mixed, scored (device) ── learner ── loss of the global batch

Everything that depends on the task is in an implementation of `aptvit.training.tasks.task.Task`.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Container, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from aptvit.hosts.pretrained import Host
from aptvit.measuring.memory import keep_freed_memory
from aptvit.measuring.progress import Progress, ProgressLines, silent
from aptvit.storage.agreement import digest_tensors
from aptvit.storage.writing import write_json
from aptvit.training.agreement import check_agreement, describe_data, describe_host, describe_recipe
from aptvit.training.checkpoints import (
    FORMAT,
    Checkpoint,
    holds_checkpoints,
    newest_checkpoint,
    write_checkpoint,
    write_model,
)
from aptvit.training.data import Batch, make_loader
from aptvit.training.heads import check_new_head
from aptvit.training.log import RunLog, RunningMeans, print_line, read_log
from aptvit.training.methods import Shares, settings_from
from aptvit.training.micro_batches import choose_micro_batch
from aptvit.training.optimization import choose_trained, make_optimizer, make_schedule, parameter_groups
from aptvit.training.page import write_page
from aptvit.training.processes import Processes
from aptvit.training.recipes.common import Recipe
from aptvit.training.sampler import BalancedBatches
from aptvit.training.stopping import Stopped, StopSignals
from aptvit.training.tasks.make_task import make_task
from aptvit.training.validation import Validation

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
        if recipe.workers < 0 or recipe.precision == "auto":
            workers = self.processes.workers(recipe.workers)
            recipe = replace(recipe, workers=workers, precision=self.processes.precision)
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        if host.adaptive is not None:
            recipe = settings_from(recipe, host.adaptive)
        self.recipe = recipe
        described_host = describe_host(host)  # before a task changes it
        _seed(recipe.seed)  # new parameters are the same on all processes
        self.task = make_task(recipe, host, images, evaluation, self.processes.device)
        self.task.start_from(start)
        self.network, self.model = self.task.network, self.task.model
        self.shares = Shares(self.model, recipe)
        self.validation = Validation(self.task, recipe, self.shares, self.processes, self._stop_requested)
        choose_trained(self.network, self.model, recipe, self.task.new_head)
        if recipe.checkpointing:
            self.model.set_grad_checkpointing()
        self.batches = BalancedBatches(
            len(images), recipe.batch_size, self.processes.rank, self.processes.world, recipe.seed
        )
        self.initial_weights = copy.deepcopy(self.network.state_dict()) if self.task.interpolate else None
        self.update = 0
        self.micro_batch_size = recipe.micro_batch_size or self._images_per_process
        self.saved_update = -1  # of the newest checkpoint of this process
        self.epoch_costs: dict[int, float] = {}  # tokens of the images of this epoch
        self.seconds = 0.0  # of training, without evaluation and checkpoints
        self.speedup: dict[str, float] | None = None
        self.num_updates = len(self.batches) * recipe.epochs
        if recipe.max_steps:
            self.num_updates = min(self.num_updates, recipe.max_steps)
        if self.task.new_head:
            check_new_head(recipe, self.num_updates, len(self.task.classes))
        self.stop = StopSignals()
        self.progress: Progress = ProgressLines(print_line) if self.processes.is_first else silent  # before the log's
        self.checkpoint: Checkpoint | None = None
        self.changes: list[str] = []
        self.agreement = {
            "format": FORMAT,
            **described_host,
            "weights to start from": None if start is None else digest_tensors(self.network.state_dict()),
            **describe_recipe(recipe),
            "training images": describe_data(images),
            "validation images": describe_data(evaluation),
            "classes": list(self.task.classes),
            "processes": self.processes.world,
        }

    # From the first update to the saved model

    def find_checkpoint(self, allow_changes: bool = False) -> list[str]:
        """Find the newest checkpoint in the folder, if there is one, for `run` to continue from.

        Args:
            allow_changes: Continue also if recipe, model or data differ, where the checkpoint fits them.

        Returns:
            A text for each difference.

        Raises:
            ValueError: If something differs and is not allowed to, or the checkpoint is damaged.
        """
        self.checkpoint = newest_checkpoint(self.run_folder)
        if self.checkpoint is not None and self.checkpoint.folder is not None:
            before = self.checkpoint.agreement
            self.changes = check_agreement(self.checkpoint.folder, before, self.agreement, allow_changes)
        return self.changes

    def run(self, resume: bool = False, allow_changes: bool = False) -> dict[str, Any]:
        """Train, evaluate and write the model.

        Args:
            resume: Continue from the newest checkpoint in the folder, if there is one.
            allow_changes: As for `find_checkpoint`.

        Returns:
            ``finished``, whether all updates were made; ``updates``; ``seconds`` of training; ``speedup`` of a step
            over the uniform model, or None if it was not measured; ``evaluations``, the metrics of each evaluation and
            share of the tokens.

        Raises:
            ValueError: If the loss or the weights are not finite, or the checkpoint cannot be continued.
            WriteError: If the model cannot be written.
            ProcessLost: If another process of the training ended.
        """
        with self.processes.watched():
            return self._run(resume, allow_changes)

    def _run(self, resume: bool, allow_changes: bool) -> dict[str, Any]:
        if resume and self.checkpoint is None:
            self.find_checkpoint(allow_changes)
        if not resume and holds_checkpoints(self.run_folder):
            raise ValueError(f"{self.run_folder} holds a training already: continue it, or begin in another folder")
        checkpoint = self.checkpoint
        if checkpoint is None:
            self._prepare_shares()
            micro_batch_note = self._choose_micro_batch()
            self._measure_speedup()
        else:
            self._load_weights(checkpoint)
            if self.changes:
                self._calibrate()
        self._start(checkpoint)
        self.schedule: Any
        with (
            RunLog(self.run_folder, self.num_updates, self.update, quiet=not self.processes.is_first) as self.log,
            self.stop,
        ):
            if checkpoint is None:
                self._log_notes(self.task.note, micro_batch_note)
                self._log_speedup()
            try:
                self._train(is_new=checkpoint is None)
                self._interpolate()
                self._evaluate()
            except Stopped:
                self.log.print(f"stopped after {self.update} updates: continue with the same command and --resume")
                return self._results(finished=False)
            self._finish()
        return self._results(finished=True)

    def _train(self, is_new: bool) -> None:
        """Make all updates, and the evaluations before and between them.

        Raises:
            Stopped: If a signal requested to stop.
        """
        if is_new:
            if self.num_updates:
                self._evaluate()
            self._seed_process()
        elif self.update % self.updates_per_epoch == 0:
            self._evaluate_after_epoch()  # if the process was killed in it
        pin = self.processes.device.type == "cuda"
        loader = make_loader(self.task.images, self.batches, self.recipe.workers, pin)
        for epoch in range(self.update // self.updates_per_epoch, self.recipe.epochs):
            if self._stop_requested():
                raise Stopped
            if self._is_over():
                break
            self._epoch(epoch, loader)
        if self._stop_requested():
            raise Stopped

    @property
    def updates_before(self) -> int:
        """Number of updates of the checkpoint that the training continues; 0 without one."""
        return 0 if self.checkpoint is None else self.checkpoint.update

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
        means, stop = RunningMeans(), False
        self.learner.train()
        clock = time.perf_counter()
        for batch in loader:
            self._log_problems(batch)
            values = self._update(batch, self.epoch_costs)
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            means.add(values, len(batch) * self.processes.world)
            is_over = self._is_over()
            if self.update % _LOG_EVERY == 0 or is_over:
                self._log_updates(means)
                means = RunningMeans()
            # All that follows from the update, before it is saved: the next process begins with the next update.
            if self.update % self.updates_per_epoch == 0:
                self._store_costs()
            if self.recipe.recalibrate and self.update % self.recipe.recalibrate == 0 and not is_over:
                self._calibrate(epoch=self.update // self.updates_per_epoch)
                self.learner.train()
                now = time.perf_counter()
                self.seconds, clock = self.seconds + now - clock, now
            stop = self._stop_requested()
            if stop or (self.recipe.save_every and self.update % self.recipe.save_every == 0):
                self._save()
                stop, clock = self._stop_requested(), time.perf_counter()
            if stop or is_over:
                break
        if not stop:
            if self.saved_update != self.update:
                self._save()
            self._evaluate_after_epoch()

    def _evaluate_after_epoch(self) -> None:
        """Evaluate the shares that the log has no results of, if it is time to and more updates follow."""
        epochs = self.update // self.updates_per_epoch
        if not self.recipe.eval_every or epochs % self.recipe.eval_every or not self.update or self._is_over():
            return
        lines = read_log(self.run_folder) if self.processes.is_first else []
        evaluated = {line["share"] for line in lines if line["what"] == "eval" and line["update"] == self.update}
        self._evaluate(self.processes.broadcast_value(evaluated))

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
                tokens = zip(part.index.tolist(), losses.tokens, part.valid.tolist(), strict=True)
                costs.update({index: number for index, number, is_valid in tokens if is_valid})
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

    def _gathered_costs(self) -> Tensor:
        """The tokens of each image in this epoch from all processes, and whether they are counted, (2, images)."""
        table = torch.zeros(2, len(self.task.images), device=self.processes.device)
        if not self.recipe.balance or self.processes.world == 1:
            return table.cpu()
        index = torch.tensor(list(self.epoch_costs), dtype=torch.long, device=table.device)
        table[0, index] = torch.tensor(list(self.epoch_costs.values()), dtype=torch.float32, device=table.device)
        table[1, index] = 1
        return self.processes.sum(table).cpu()

    def _store_costs(self) -> None:
        """Distribute the images of the next epoch evenly, by their tokens in this one."""
        tokens, counts = self._gathered_costs().numpy()
        counted = counts.nonzero()[0]
        self.batches.store_costs(counted, tokens[counted] / counts[counted])
        self.epoch_costs = {}

    # Shares of the tokens

    def _prepare_shares(self) -> None:
        samples = self.task.samples
        plain = samples.plain(_SCORER_IMAGES).tracked(self.progress, "training the scorer, batches")
        augmented = samples.augmented().tracked(self.progress, "calibrating thresholds, batches")
        with torch.random.fork_rng():
            self.shares.prepare(plain, augmented, self.task.uniform_outputs)
        self.processes.broadcast(self.network)
        self.shares.thresholds = self.processes.broadcast_value(self.shares.thresholds)

    def _calibrate(self, epoch: int = 0) -> None:
        """Calibrate the thresholds of the shares on augmented images of an epoch."""
        with torch.random.fork_rng():
            self.shares.calibrate(self.task.samples.augmented(epoch))
        self.shares.thresholds = self.processes.broadcast_value(self.shares.thresholds)

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
        self.speedup = asdict(self.task.speedup(self.processes.accelerator, self.micro_batch_size, self.progress))

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

    def _evaluate(self, evaluated: Container[float] = ()) -> None:
        """Evaluate each share of the tokens on the validation images, except those that are evaluated."""
        averaged: Any = None if self.ema is None or not self.update else self.ema.module  # no average before an update
        self.validation.evaluate(self.learner, averaged, self.update, self.log, evaluated)
        self.learner.train()

    def _interpolate(self) -> None:
        """Move the trained weights towards the initial ones as far as they agree best with the teacher."""
        if self.initial_weights is None or self.task.evaluation is None:
            return
        trained: Any = self.network if self.ema is None else self.ema.module
        weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        self.ema = None  # the interpolated weights replace the average
        self.validation.interpolate(self.learner, self.initial_weights, weights, self.update, self.log)

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
        """Write a checkpoint. If it cannot be written, for example on a full disk, the training continues.

        Raises:
            ValueError: If weights are not finite.
        """
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
                "epoch_costs": self._gathered_costs(),
                "speedup": self.speedup,
                "drawn": getattr(self.model, "num_batches", None),
                "micro_batch_size": self.micro_batch_size,
            },
            self.agreement,
        )

        def write() -> bool:
            try:
                write_checkpoint(self.run_folder, checkpoint, self.recipe.keep_checkpoints)
            except OSError as error:
                self.log.print(f"no checkpoint after {self.update} updates: {error}", style="yellow")
                self.log.write(self.update, "problem", message=str(error))
                return False
            return True

        if processes.broadcast_value(processes.on_first(write)):
            self.saved_update = self.update

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        """Load the state that is needed before the model is distributed over processes."""
        try:
            self.network.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"{checkpoint.folder} does not fit this model ({reason}): begin in another --out"
            ) from None
        self.update, self.seconds = checkpoint.update, checkpoint.state["seconds"]
        self.shares.thresholds = checkpoint.state["thresholds"]
        if len(checkpoint.state["costs"]) == len(self.batches.costs):  # unless the images changed
            self.batches.costs = checkpoint.state["costs"].numpy()
            if self.processes.is_first:
                tokens, counts = checkpoint.state["epoch_costs"]
                self.epoch_costs = {i: float(tokens[i]) for i in counts.nonzero()[:, 0].tolist()}
        self.speedup = checkpoint.state["speedup"]
        # The same parts as before, because their number changes the rounding.
        self.micro_batch_size = self.recipe.micro_batch_size or checkpoint.state["micro_batch_size"]
        if checkpoint.state["drawn"] is not None:
            self.model.num_batches = checkpoint.state["drawn"]

    def _load_optimizer(self, checkpoint: Checkpoint) -> None:
        processes, groups = self.processes, [dict(group) for group in self.optimizer.param_groups]
        try:
            processes.load_optimizer_state(self.optimizer, checkpoint.state["optimizer"])
        except ValueError as error:
            raise ValueError(f"{checkpoint.folder} does not fit these settings ({error}): take the earlier") from None
        if self.changes:  # the state of each parameter is that of the checkpoint, the settings are new
            for group, values in zip(self.optimizer.param_groups, groups, strict=True):
                group.update({name: value for name, value in values.items() if name != "params"})
        if self.ema is not None and checkpoint.ema is not None:
            self.ema.module.load_state_dict(checkpoint.ema)
        if processes.accelerator.scaler and checkpoint.state["scaler"]:
            processes.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        if not processes.load_random_states(checkpoint.state["random"]):
            self._seed_process()

    def _finish(self) -> None:
        """Write the model, the results and the page; with averaged weights if there are any, and plain thresholds."""
        self.shares.thresholds = self.validation.plain_thresholds()
        self.shares.set(self.recipe.keep)
        weights = self.processes.weights(self.network if self.ema is None else self.ema.module)

        def write() -> None:
            folder, size = self.run_folder / "model", sum(tensor.nbytes for tensor in weights.values())
            folder.mkdir(parents=True, exist_ok=True)
            deleted = write_model(self.run_folder, lambda: self.task.save(folder, weights), size)
            if deleted:
                note = f"the disk is full: {', '.join(map(str, deleted))} were deleted to write the model"
                self.log.print(note, style="yellow")
                self.log.write(self.update, "problem", message=note)
            write_json(self.run_folder / "results.json", self._results(finished=True))
            write_page(self.run_folder, self.recipe)

        self.processes.on_first(write)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
