"""The verdict on held-out images, in one sentence, and the model that it is about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aptvit.api import adapt
from aptvit.measuring.tables import Columns, markdown_page, markdown_table
from aptvit.merging import ReducedAdaptive
from aptvit.storage.writing import write_text
from aptvit.tuning.record import Trial
from aptvit.tuning.search import Search, SearchResult

__all__ = ["Verdict", "as_markdown", "judge", "table_of", "write_tuned"]

_WORTH_IT = 0.95  # of the time, or of the operations if they are the goal: what saves less is left as it is


@dataclass(frozen=True)
class Verdict:
    """What to take.

    Attributes:
        kind: Adaptive patches, a smaller image, ToMe, or the model as it is.
        trial: Its trial on held-out images; None for the model as it is.
        sentence: The verdict in words.
    """

    kind: Literal["adaptive", "downscale", "tome", "uniform"]
    trial: Trial | None
    sentence: str


def judge(result: SearchResult) -> Verdict:
    """Compare the best of each kind on held-out images.

    The search's choice is taken if it is nearer to the uniform model than a smaller image by more than chance, or
    faster at the same agreement; a smaller image, which is simpler, in all other cases.

    Args:
        result: The result of a search.
    """
    goal, trials = result.goal, [trial for trial in result.finalists if trial.candidate.name != "random"]
    if not trials:
        return Verdict("uniform", None, "Leave the model as it is: only a random choice of patches can run on it.")
    choice = trials[0]
    smaller = next((trial for trial in trials if trial.candidate.name == "downscale"), None)
    reason = ""
    if goal.limits_cost:
        if smaller is not None and choice is not smaller:
            gain = choice.nearer_than(smaller)
            if gain.low > 0:
                further = f"{gain.mean:.3g} ({gain.low:.3g} to {gain.high:.3g})"
                reason = f"; the distance of a smaller image, {_figures(smaller)}, is larger by {further}"
            else:
                reason = (
                    f"; {choice.candidate}, {_figures(choice)}, is not nearer to the uniform model, and less simple"
                )
                choice = smaller
    elif smaller is not None and choice is not smaller and smaller.agreement.mean >= goal.value:
        if smaller.time.median <= choice.time.median * 1.03:
            reason = f"; {choice.candidate}, {_figures(choice)}, gains nothing beside it"
            choice = smaller
        else:
            reason = f"; a smaller image takes {smaller.time.median:.0%} of the time for {smaller.agreement.mean:.1%}"
    if _cost(result, choice) > _WORTH_IT:
        sentence = f"Leave the model as it is: the best for {goal} is {choice.candidate}, {_figures(choice)}."
        return Verdict("uniform", None, sentence)
    kind: Any = "adaptive" if choice.candidate.is_adaptive else choice.candidate.name
    method = f"{choice.candidate} ({choice.setting})"
    missed = "" if _meets(result, choice) else f" This misses the goal, {goal}: nothing that was tried reaches it."
    images = len(choice.distances)
    return Verdict(kind, choice, f"Take {method}: {_figures(choice)} on {images} held-out images{reason}.{missed}")


def _meets(result: SearchResult, trial: Trial) -> bool:
    goal = result.goal
    if goal.kind == "agreement":
        return trial.agreement.high >= goal.value
    return (trial.gflops if goal.kind == "gflops" else trial.time.median) <= goal.value * 1.05


def _cost(result: SearchResult, trial: Trial) -> float:
    """Cost relative to the uniform model."""
    return trial.gflops / trial.gflops_uniform if result.goal.kind == "gflops" else trial.time.median


def _figures(trial: Trial) -> str:
    return (
        f"{trial.time.median:.0%} of the time, agreement {trial.agreement.mean:.1%} ({trial.agreement.low:.1%} to "
        f"{trial.agreement.high:.1%})"
    )


def table_of(result: SearchResult) -> tuple[Columns, list[Trial]]:
    """Columns and rows of the table: the best of each kind on held-out images."""
    columns: Columns = (
        ("method", lambda row: str(row.candidate)),
        ("setting", lambda row: row.setting),
        ("tokens", lambda row: f"{row.tokens:.1%}"),
        ("GFLOPs", lambda row: f"{row.gflops:.3g}"),
        ("time", lambda row: f"{row.time:.2f}"),
        ("agreement", lambda row: f"{row.agreement.mean:.1%} ({row.agreement.low:.1%} to {row.agreement.high:.1%})"),
        ("distance", lambda row: f"{row.distance.mean:.3f} ({row.distance.low:.3f} to {row.distance.high:.3f})"),
    )
    return columns, result.finalists


_ABOUT = """\
The best of each kind on images that the search did not see. **time** is relative to the uniform model in the same
process, from normalised images in memory to outputs: the median, the smallest and the largest of the rounds.
**agreement** is the share of images with the uniform model's top-1 class (of embeddings, the mean cosine), **distance**
the mean Kullback-Leibler divergence from its classes (of embeddings, one minus the cosine). Intervals are 95 %, by
bootstrap over the images."""


def as_markdown(result: SearchResult, verdict: Verdict) -> str:
    """The search as a page."""
    record = result.record
    failed = "\n".join(f"- could not run: {trial.candidate}: {trial.error}" for trial in record.failed)
    tried = f"{len(record.measured)} trials of {len({trial.candidate for trial in record.rows})} candidates."
    parts = (verdict.sentence, markdown_table(*table_of(result)), _ABOUT, tried, failed)
    return markdown_page(f"Tuned for {result.goal}", record.commands, record.environment, *filter(None, parts))


def write_tuned(search: Search, result: SearchResult, verdict: Verdict, folder: Path) -> str:
    """Write the model of the verdict to a folder, as ``save_pretrained`` does, with ``tuned.md``.

    The folder holds an adaptive model in any case: of a smaller image, or of the model as it is, with nothing merged.
    ToMe is not part of it.

    Args:
        search: The search.
        result: Its result.
        verdict: The verdict.
        folder: The folder.

    Returns:
        The line of code to add after `aptvit.from_pretrained`; empty if there is none.
    """
    trial, code = verdict.trial, ""
    model: Any = None
    if trial is not None:
        model = search.prepared(trial).model
        if isinstance(model, ReducedAdaptive):
            code = _merging("model", model)
            model = model.model
        elif verdict.kind == "tome":
            code = _merging("vit", model)
            model = None
        elif verdict.kind == "downscale":
            model = adapt(model, keep=1.0)
    if model is None:
        model = adapt(search.host.model, keep=1.0)
    model.save_pretrained(folder)
    write_text(folder / "tuned.md", as_markdown(result, verdict))
    return code


def _merging(name: str, model: Any) -> str:
    return f"aptvit.merging.tome({name}, r={list(model.reduction.r)})"
