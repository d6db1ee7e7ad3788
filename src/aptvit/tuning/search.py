"""The search: successive halving of methods, each at the share of the tokens that meets the goal.

    all candidates ─ a few images ── half ── more images ── quarter ── all images ── best of each kind ── held out
                     operations alone          paired times              paired times                    verdict

The best smaller image, ToMe and adaptive patches stay to the end, so that the verdict compares them. Distances between
outputs rank the candidates where the cost is given; the cost ranks them where the agreement is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import aptvit
from aptvit.datasets.labelled import LabelledImages
from aptvit.evaluation.inputs import HostInputs
from aptvit.evaluation.methods import Conditions, Prepared, prepare
from aptvit.evaluation.statistics import agrees, divergences
from aptvit.hosts.pretrained import Host
from aptvit.measuring.machine import digest_files, prepare_machine
from aptvit.measuring.operations import mean_gflops
from aptvit.measuring.progress import Progress, silent
from aptvit.measuring.rounds import paired_rounds
from aptvit.storage.locking import only_writer
from aptvit.training.agreement import describe_host
from aptvit.tuning.record import Trial, TrialRecord
from aptvit.tuning.space import LEAST_SHARE, Candidate, Goal, default_candidates

__all__ = ["Search", "SearchResult", "split_images"]

_FEW, _MORE = 32, 96  # images of the first two rounds of halving
_SLACK = 1.03  # of the goal: times of two runs of the same work differ by as much
_FITTED = 128  # most images that scorers learn from
_TRIES = 4  # shares that are tried for a goal


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        goal: What was asked for.
        finalists: The best of each kind on held-out images, the search's choice first.
        record: All trials.
    """

    goal: Goal
    finalists: list[Trial]
    record: TrialRecord


def split_images(paths: Sequence[Path], most: int) -> tuple[list[Path], list[Path]]:
    """Images to search on, and images for the verdict: every third is held out.

    Args:
        paths: Image files.
        most: Most images of both together, spread evenly.

    Raises:
        ValueError: If there are fewer than 12.
    """
    if len(paths) < 12:
        raise ValueError(f"{len(paths)} images are too few to choose by: give at least 12, better some hundreds")
    chosen = LabelledImages(list(paths), None, "").spread(most).paths
    return [path for i, path in enumerate(chosen) if i % 3 != 2], chosen[2::3]


class Search:
    """A search on a user's images.

    Args:
        load: (side of the input in pixels, or None for the model's own) -> host.
        name: Name of the model, for the record.
        paths: Images to search on.
        held_out: Images for the verdict.
        goal: What is asked for.
        output: JSON file, written after each trial; trials in it are not repeated.
        candidates: The methods; by default `default_candidates`.
        conditions: Conditions of all methods.
        command: Command line, for the record.
        fresh: Ignore the trials in the file.
        progress: Wraps long work.
        done: Called with each new trial.

    Raises:
        ValueError: If the model has random weights or reads images that are not square, or the file is of another
            model, machine, goal or other images.
    """

    def __init__(
        self,
        load: Callable[[int | None], Host],
        name: str,
        paths: Sequence[Path],
        held_out: Sequence[Path],
        goal: Goal,
        output: Path | None = None,
        *,
        candidates: Sequence[Candidate] | None = None,
        conditions: Conditions | None = None,
        command: str | None = None,
        fresh: bool = False,
        progress: Progress = silent,
        done: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        conditions = conditions or Conditions(rounds=5)
        self.load, self.goal, self.output, self.conditions = cache(load), goal, output, conditions
        self.progress, self.done = progress, done
        self.host = self.load(None)
        _, height, width = self.host.data["input_size"]
        if self.host.weights == "random":
            raise ValueError(f"{name} has random weights: give trained weights with --checkpoint")
        if height != width or not hasattr(self.host.model, "patch_embed"):
            raise ValueError(f"{name} has no square images of one size: tune takes timm's models that have")
        self.paths, self.held_out = list(paths), list(held_out)
        vit: Any = self.host.model
        self.candidates = list(
            default_candidates(width, vit.patch_embed.patch_size[0]) if candidates is None else candidates
        )
        self.inputs = cache(self._inputs)
        self.fitted = cache(self._fitted)
        environment = {
            "model": name,
            "weights": describe_host(self.host)["weights of the model"],
            "goal": str(goal),
            "images": f"{len(paths)} (sha256 {digest_files(paths)})",
            "held-out images": f"{len(held_out)} (sha256 {digest_files(held_out)})",
            "type": str(conditions.dtype).removeprefix("torch."),
            "batch": str(conditions.batch_size),
            **prepare_machine(conditions.device),
            "aptvit": aptvit.__version__,
        }
        self.record = TrialRecord.resume(output, environment, command, fresh)

    def run(self) -> SearchResult:
        """Search, and measure the best of each kind on the held-out images.

        Raises:
            ValueError: If no candidate can run, no image can be read, or another process writes the file.
        """
        with only_writer(self.output):
            return self._run()

    def _run(self) -> SearchResult:
        count, candidates = len(self.paths), self.candidates
        shares = dict.fromkeys(candidates, 0.0)
        stages = [(min(_FEW, count), 0), (min(_MORE, count), 3), (count, self.conditions.rounds)]
        trials: list[Trial] = []
        for stage, (images, rounds) in enumerate(stages):
            trials = []
            for candidate in self.progress(candidates, f"round {stage + 1} of {len(stages)}", len(candidates)):
                trial = self.solve(candidate, images, rounds, shares[candidate])
                if trial is not None:
                    trials.append(trial)
                    shares[candidate] = trial.share
            if not trials:
                raise ValueError(self._nothing_fits())
            trials = self.ranked(trials)
            candidates = [trial.candidate for trial in survivors(trials, max(3, -(-len(trials) // 2)))]
        finalists = survivors(trials, 0)
        verdict = [
            self.trial(trial.candidate, trial.share, len(self.held_out), self.conditions.rounds, True)
            for trial in finalists
        ]
        image_sets = self.inputs(count, False), self.inputs(len(self.held_out), True)
        self.record.skipped = [message for inputs in image_sets for message in inputs.read(inputs.size).skipped]
        return SearchResult(self.goal, [trial for trial in verdict if trial.error is None], self.record)

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials, the best first; those that meet the goal before the others."""

        def rank(trial: Trial) -> tuple[bool, float]:
            value = trial.distance.mean if self.goal.limits_cost else self.cost(trial)
            return not self.meets(trial), value

        return sorted(trials, key=rank)

    def cost(self, trial: Trial) -> float:
        """What the goal counts: operations, or time."""
        return trial.gflops if self.goal.kind == "gflops" else trial.time.median

    def meets(self, trial: Trial) -> bool:
        """Whether a trial meets the goal, but for the noise of times."""
        if self.goal.limits_cost:
            return self.cost(trial) <= self.goal.value * _SLACK
        return trial.agreement.mean >= self.goal.value

    def solve(self, candidate: Candidate, images: int, rounds: int, start: float) -> Trial | None:
        """The trial of a candidate at the share that meets the goal, or nearest to it; None if it cannot run.

        Args:
            candidate: The method.
            images: Number of images to compare outputs on.
            rounds: Rounds of timing; 0 counts operations.
            start: Share to begin with; 0 for a guess.
        """
        tried: list[Trial] = []
        share = start or (self.goal.value if self.goal.kind == "time" else 0.6)
        for _ in range(_TRIES if not start else 2):
            share = min(max(share, LEAST_SHARE), 1.0)
            trial = self.trial(candidate, share, 0 if self.goal.limits_cost else images, rounds)
            if trial.error is not None:
                break
            tried.append(trial)
            share = self._next_share(tried)
            if any(abs(share - other.share) < 0.01 for other in tried):
                break
        fitting = [trial for trial in tried if self.meets(trial)]
        if not tried:
            return None
        if self.goal.limits_cost:
            best = max(fitting, key=self.cost) if fitting else min(tried, key=self.cost)
            result = self.trial(candidate, best.share, images, rounds)
            return result if result.error is None else None
        return min(fitting, key=self.cost) if fitting else max(tried, key=lambda trial: trial.agreement.mean)

    def _next_share(self, tried: Sequence[Trial]) -> float:
        """The share at which the goal is met, by a line through the two trials nearest to it."""
        value = self.cost if self.goal.limits_cost else lambda trial: trial.agreement.mean
        near = sorted(tried, key=lambda trial: abs(value(trial) - self.goal.value))[:2]
        points = [(trial.share, value(trial)) for trial in near]
        # The uniform model is a point of every line.
        whole = near[0].gflops_uniform if self.goal.kind == "gflops" else 1.0
        (share, reached), (second_share, second) = points if len(points) == 2 else (points[0], (1.0, whole))
        if abs(second - reached) < 1e-6:
            return min(1.0, share + 0.15) if reached < self.goal.value and not self.goal.limits_cost else share
        return share + (self.goal.value - reached) * (second_share - share) / (second - reached)

    # One trial

    def trial(self, candidate: Candidate, share: float, images: int, rounds: int, held_out: bool = False) -> Trial:
        """The trial of the record, or a new one."""
        row = Trial(candidate, round(share, 4), images, rounds, held_out)
        self.record.measure([row], self._measure, self.output, done=self.done)
        return next(other for other in self.record.rows if other.key == row.key)

    def _measure(self, row: Trial) -> dict[str, Any]:
        """All fields of a trial except its identity."""
        inputs = self.inputs(max(row.images, self.conditions.batch_size), row.held_out)
        prepared = self.prepared(row)
        sides = inputs.uniform, prepared
        batches = [inputs.timed_batches(side.size)[:1] for side in sides]
        with torch.inference_mode():
            prepared.run(batches[1][0])  # derives weights, which is done once
            gflops = [
                mean_gflops(side.model, side.run, batch, self.conditions.device)
                for side, batch in zip(sides, batches, strict=True)
            ]
            seconds: list[list[float]] = [[], []]
            if row.rounds:
                runs = [lambda pair: sides[0].run(pair[0]), lambda pair: sides[1].run(pair[1])]
                pairs = list(zip(*batches, strict=True))
                seconds = paired_rounds(runs, pairs, row.rounds, self.conditions.device, warmup=1)
        values = {"setting": prepared.setting, "gflops_uniform": gflops[0], "gflops": gflops[1]}
        values |= {"seconds_uniform": tuple(seconds[0]), "seconds": tuple(seconds[1])}
        return values | (self._compared(inputs, prepared) if row.images else {})

    def _compared(self, inputs: HostInputs, prepared: Prepared) -> dict[str, Any]:
        reference, _ = inputs.uniform_outputs
        outputs, tokens = inputs.outputs(prepared, prepared.setting)
        if not outputs.isfinite().all():
            raise ValueError(f"some outputs are not finite: {self.conditions.dtype} is too narrow for this model")
        agreements, distances = nearness(outputs, reference, bool(self.host.model.num_classes))
        share = sum(tokens) / len(tokens) / inputs.num_tokens
        return {"tokens": share, "agreements": agreements, "distances": distances}

    def _inputs(self, count: int, held_out: bool) -> HostInputs:
        files = LabelledImages(self.held_out if held_out else self.paths, None, "none").spread(count)
        return HostInputs(self.host, files, self.conditions, silent)

    def prepared(self, trial: Trial) -> Prepared:
        """The model of a trial, ready to run."""
        return prepare(trial.candidate.at(trial.share), self.fitted(trial.candidate.size))

    def _fitted(self, size: int) -> HostInputs:
        """The host at a size, with what its scorers learn from the images of the search."""
        host = self.host if size == self.host.data["input_size"][-1] else self.load(size)
        files = LabelledImages(self.paths, None, "none").spread(_FITTED)
        return HostInputs(host, files, self.conditions, silent)

    def _nothing_fits(self) -> str:
        reasons = sorted({f"{trial.candidate}: {trial.error}" for trial in self.record.failed})
        return f"nothing that was tried can run on this model. {'; '.join(reasons)}"


def survivors(trials: Sequence[Trial], number: int) -> list[Trial]:
    """The first trials, and the first of each kind: adaptive, a smaller image, ToMe, random patches.

    Args:
        trials: Trials, the best first.
        number: How many to keep at least, where there are as many.
    """
    first_of_kind = {trial.candidate.is_adaptive or trial.candidate.name: trial for trial in reversed(trials)}
    kept = {id(trial) for trial in (*trials[:number], *first_of_kind.values())}
    return [trial for trial in trials if id(trial) in kept]


def nearness(outputs: Tensor, reference: Tensor, are_logits: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Agreement and distance of each image, see `aptvit.tuning.record.Trial`.

    Args:
        outputs: (N, C) logits or embeddings.
        reference: (N, C) those of the uniform model.
        are_logits: Whether they are logits.
    """
    if are_logits:
        return tuple(agrees(outputs, reference).double().tolist()), divergences(outputs, reference)
    cosines = F.cosine_similarity(outputs.double(), reference.double()).numpy().round(6)
    return tuple(cosines.tolist()), tuple((1 - cosines).tolist())
