"""A training, from a recipe to a model on disk: read `Training.run` from top to bottom.

images ── read, augmented (workers) ── normalised, erased, mixed, scored (device) ── learner ── loss of the global batch

Classes, boxes and pixels are the tasks' (`aptvit.training.tasks.task`).
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import asdict
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
from aptvit.training.log import Meter, RunLog, read_log
from aptvit.training.methods import Shares
from aptvit.training.optimization import choose_trained, make_optimizer, make_schedule, parameter_groups
from aptvit.training.page import write_page
from aptvit.training.processes import Processes
from aptvit.training.recipes.common import Recipe
from aptvit.training.sampler import FILLER, BalancedBatches, Draw
from aptvit.training.stopping import StopSignals
from aptvit.training.tasks.make_task import make_task

__all__ = ["Training"]

_SCORER_IMAGES = 2048  # that a scorer is trained on

_LOG_EVERY = 10


class Training:
    """A training.

    Args:
        recipe: Of the task.
        host: The pretrained model; its weights are changed.
        images: To train on.
        evaluation: To evaluate on.
        run: Folder for checkpoints, log and the final model.
        start: Of boxes and pixels: an earlier training to take weights from.

    Raises:
        ValueError: If recipe, model and images do not fit each other.
        ImportError: If what training needs is not installed; the message names the extra.
    """

    def __init__(
        self, recipe: Recipe, host: Host, images: Any, evaluation: Any, run: Path, start: Path | None = None
    ) -> None:
        self.recipe, self.run_folder = recipe, Path(run)
        self.processes = Processes(recipe)
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        _seed(recipe.seed)  # new parameters are the same everywhere
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
        # To go back from a training that went too far
        self.before = copy.deepcopy(self.network.state_dict()) if self.task.interpolate else None
        self.update = 0
        self.seconds = 0.0  # of training, without evaluation
        self.speedup: dict[str, float] | None = None
        self.num_updates = len(self.batches) * recipe.epochs
        if recipe.max_steps:
            self.num_updates = min(self.num_updates, recipe.max_steps)

    # From the first update to the saved model

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train, evaluate, write the model.

        Args:
            resume: Continue from the newest checkpoint in the folder, if there is one.

        Returns:
            ``finished``; ``updates``; ``seconds`` of training; ``speedup`` of a step beside the uniform model's, or
            None; ``evaluations``, a dict for each share and time.
        """
        found = newest_checkpoint(self.run_folder) if resume else None
        if found is None:
            self._prepare_shares()
            self._measure_speedup()
        else:
            self._load_weights(found)
        self._start(found)
        self.schedule: Any
        with (
            RunLog(self.run_folder, self.num_updates, self.update, quiet=not self.processes.is_first) as self.log,
            StopSignals() as self.stop,
        ):
            if found is None:
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
            del loader  # ends the processes that read
            if self.stop.requested:
                self.log.say(f"stopped after {self.update} updates: the same command with --resume continues")
                return self._results(finished=False)
            self._interpolate()
            self._evaluate()
            self._finish()
        return self._results(finished=True)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.task.images) // self.recipe.batch_size)

    def _seed_process(self) -> None:
        """From here on each process draws other random numbers."""
        _seed(self.recipe.seed + 1 + self.processes.rank)

    def _start(self, found: Checkpoint | None) -> None:
        """Model on all processes, optimizer, schedule; and the state of an interrupted training."""
        processes, recipe = self.processes, self.recipe
        self.learner = processes.spread(self.task.learner(self.network), self.model)
        if recipe.compile:
            self.model.compile()
        self.optimizer = make_optimizer(parameter_groups(self.network, self.model, recipe), recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.num_updates)
        self.stepper = processes.accelerator.prepare_optimizer(self.optimizer)
        self.ema = ModelEmaV3(self.network, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        if found is not None:
            self._load_optimizer(found)

    def _is_over(self) -> bool:
        limit = 60 * self.recipe.max_minutes
        late = bool(limit) and self.processes.same_value(self.seconds >= limit)
        return self.update >= self.num_updates or late

    # Epochs and updates

    def _epoch(self, epoch: int, loader: Iterable[Batch]) -> None:
        self.batches.epoch, self.batches.start = epoch, self.update - epoch * self.updates_per_epoch
        costs: dict[int, float] = {}
        meter = Meter()
        self.learner.train()
        clock = time.perf_counter()
        for batch in loader:
            self._log_problems(batch)
            values = self._update(batch, costs)
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            meter.add(values, len(batch) * self.processes.world)
            if self.update % _LOG_EVERY == 0 or self._is_over():
                self._log_updates(meter)
                meter = Meter()
            stop = self._asked_to_stop()
            if stop or (self.recipe.save_every and self.update % self.recipe.save_every == 0):
                self._save()
                clock = time.perf_counter()
            if stop or self._is_over():
                break
            if self.recipe.recalibrate and self.update % self.recipe.recalibrate == 0:
                self._recalibrate()
        self._learn_costs(costs)
        if not self.stop.requested:
            self._save()
            if self.recipe.eval_every and (epoch + 1) % self.recipe.eval_every == 0 and not self._is_over():
                self._evaluate()

    def _update(self, batch: Batch, costs: dict[int, float]) -> dict[str, Tensor]:
        """One step of the optimizer on the batch of all processes together."""
        recipe, processes = self.recipe, self.processes
        shares = self.shares.of_method
        self.shares.set(shares[self.update % len(shares)])
        self.schedule.step_update(self._progress())
        number = processes.sum(batch.valid.sum().to(processes.device, torch.float32)).clamp(min=1)
        # The same number of parts everywhere: sharded parameters are gathered in each.
        most = -(-recipe.batch_size // processes.world)
        parts = batch.parts(-(-most // (recipe.micro_batch_size or most)))
        total, kept = torch.zeros((), device=processes.device), 0.0
        for i, part in enumerate(parts):
            with processes.without_sync(self.learner, is_last=i == len(parts) - 1):
                losses = self.task.losses(self.learner, part, processes.accelerator)
                # Gradients are averaged over processes, and an image is to count the same on all of them.
                loss = (losses.each * part.valid.to(losses.each.device)).sum() / number * processes.world
                processes.accelerator.backward(loss)
            total += loss.detach() / processes.world
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
        """Updates done; where the clock decides, as many as there would be at this share of the time."""
        limit = 60 * self.recipe.max_minutes
        by_clock = self.num_updates * self.seconds / limit if limit else 0.0
        progress: float = self.processes.same_value(max(self.update, by_clock)) if limit else self.update
        return min(progress, self.num_updates - 1)

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop."""
        if self.processes.world > 1:
            asked = torch.tensor(float(self.stop.requested), device=self.processes.device)
            self.stop.requested = bool(self.processes.sum(asked))
        return self.stop.requested

    def _learn_costs(self, costs: dict[int, float]) -> None:
        """Tokens of each image, from all processes, so that the next epoch can be distributed evenly."""
        if not self.recipe.balance or self.processes.world == 1:
            return
        table = torch.zeros(2, len(self.task.images), device=self.processes.device)
        index = torch.tensor(list(costs), dtype=torch.long, device=table.device)
        table[0, index] = torch.tensor(list(costs.values()), dtype=torch.float32, device=table.device)
        table[1, index] = 1
        tokens, counts = self.processes.sum(table).cpu().numpy()
        seen = counts.nonzero()[0]
        self.batches.learn(seen, tokens[seen] / counts[seen])

    # Shares of the tokens

    def _prepare_shares(self) -> None:
        with torch.random.fork_rng():
            self.shares.prepare(
                self.task.samples.plain(_SCORER_IMAGES), self.task.samples.trained(), self.task.uniform_answers
            )
        self.processes.same(self.network)
        self.shares.thresholds = self.processes.same_value(self.shares.thresholds)

    def _recalibrate(self) -> None:
        """Thresholds that keep the shares on the augmented images of this epoch."""
        with torch.random.fork_rng():
            self.shares.calibrate(self.task.samples.trained(self.update // self.updates_per_epoch))
        self.shares.thresholds = self.processes.same_value(self.shares.thresholds)
        self.learner.train()

    # Log and evaluation

    def _measure_speedup(self) -> None:
        """Forward and backward of the uniform and of the trained model, interleaved, on the first images."""
        trained = self.num_updates and self.recipe.trains != "new"
        if self.recipe.method == "uniform" or not trained or self.processes.shard:
            return
        self.shares.set(self.shares.of_method[0])
        self.speedup = asdict(self.task.speedup(self.processes.accelerator))

    def _log_speedup(self) -> None:
        if self.speedup is not None:
            spread = "{median:.2f} times as fast as uniform training ({least:.2f} to {most:.2f})".format(**self.speedup)
            self.log.write(0, "start", method=self.recipe.method, **self.speedup)
            self.log.say(f"{spread}, forward and backward")

    def _log_updates(self, meter: Meter) -> None:
        values = meter.values()
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
            self.log.say(f"skipped: {problem}", style="yellow")
            self.log.write(self.update, "problem", message=problem)

    def _evaluate(self) -> None:
        """Each share on the validation images."""
        if self.task.evaluation is None:
            return
        training, self.shares.thresholds = self.shares.thresholds, self._plain_thresholds()
        for share in self.shares.of_method:
            self.shares.set(share)
            values = self._score(self.learner, self.network)
            if self.ema is not None and self.update:  # before that there is nothing to average
                module: Any = self.ema.module
                averaged = Shares(self.task.model_in(module), self.recipe)
                averaged.thresholds = self.shares.thresholds
                averaged.set(share)
                found = self._score(self.task.learner(module), module)
                values |= {f"ema_{name}": value for name, value in found.items()}
            self.log.write(self.update, "eval", share=share, **values)
            text = ", ".join(f"{name} {_percent(name, value)}" for name, value in values.items())
            self.log.say(f"after {self.update} updates: {text}")
        self.shares.thresholds = training
        self.learner.train()

    def _interpolate(self) -> None:
        """Take the weights between initial and trained ones that agree best with the teacher on validation images."""
        if self.before is None or self.task.evaluation is None:
            return
        trained: Any = self.network if self.ema is None else self.ema.module
        after = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
        self.ema = None  # the interpolated weights replace the average
        learned = {name for name, _ in self.network.named_parameters()}
        training, self.shares.thresholds = self.shares.thresholds, self._plain_thresholds()
        found = {}
        for way in (self.task.interpolate * step / 4 for step in range(5)):
            self._set_between(self.before, after, learned, way)
            total = 0.0
            for share in self.shares.of_method:
                self.shares.set(share)
                total += self._score(self.learner, self.network)["divergence"]
            found[way] = total / len(self.shares.of_method)
        best = min(found, key=found.__getitem__)
        self._set_between(self.before, after, learned, best)
        self.shares.thresholds = training
        divergences = {f"divergence_{way:g}": value for way, value in found.items()}
        self.log.write(self.update, "interpolation", way=best, **divergences)
        self.log.say(f"{best:.0%} of the way from the initial to the trained weights agrees best on validation images")

    def _set_between(self, before: dict[str, Tensor], after: dict[str, Tensor], learned: set[str], way: float) -> None:
        mixed = {name: before[name].to(value).lerp(value, way) for name, value in after.items() if name in learned}
        self.network.load_state_dict({**after, **mixed})

    def _score(self, learner: Any, network: Any) -> dict[str, float]:
        loader = make_loader(self.task.evaluation, self._evaluation_batches(), self.recipe.workers)
        return self.task.score(learner, network, loader, self.processes.accelerator)

    def _evaluation_batches(self) -> list[list[Draw]]:
        """The part of this process; all processes have the same number of batches."""
        size, world = self.task.evaluated_at_once, self.processes.world
        mine = [Draw(i, 0) for i in range(self.processes.rank, len(self.task.evaluation), world)]
        mine += [FILLER] * (-(-len(self.task.evaluation) // world) - len(mine))
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def _plain_thresholds(self) -> dict[float, tuple[float, ...]]:
        """Thresholds for images as they are evaluated: augmented ones have other scores."""
        training = self.shares.thresholds
        try:
            self.shares.thresholds = {}
            self.shares.calibrate(self.task.samples.plain())
            found: dict[float, tuple[float, ...]] = self.processes.same_value(self.shares.thresholds)
            return found
        finally:
            self.shares.thresholds = training

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
        """Write a checkpoint. On a full disk the checkpoint is lost, not the training."""
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
                "recipe": self.recipe.to_yaml(),
            },
        )
        if processes.is_first:
            try:
                write_checkpoint(self.run_folder, checkpoint, self.recipe.keep_checkpoints)
            except OSError as error:
                self.log.say(f"no checkpoint after {self.update} updates: {error}", style="yellow")
                self.log.write(self.update, "problem", message=str(error))
        processes.wait()

    def _load_weights(self, found: Checkpoint) -> None:
        """The state that is needed before the model is spread over processes."""
        self.network.load_state_dict(found.weights)
        self.update, self.seconds = found.update, found.state["seconds"]
        self.shares.thresholds = found.state["thresholds"]
        self.batches.costs = found.state["costs"].numpy()
        self.speedup = found.state["speedup"]
        if found.state["drawn"] is not None:
            self.model.num_batches = found.state["drawn"]

    def _load_optimizer(self, found: Checkpoint) -> None:
        processes = self.processes
        processes.load_optimizer_state(self.optimizer, found.state["optimizer"])
        if self.ema is not None and found.ema is not None:
            self.ema.module.load_state_dict(found.ema)
        if processes.accelerator.scaler and found.state["scaler"]:
            processes.accelerator.scaler.load_state_dict(found.state["scaler"])
        processes.load_random_states(found.state["random"])

    def _finish(self) -> None:
        """The model as a user loads it: averaged weights if there are any, thresholds for images as they are."""
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
