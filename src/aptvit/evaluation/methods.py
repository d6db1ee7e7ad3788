"""The methods by name: what a person writes, and what runs.

tome                 at each share of the tokens that is asked for
tome@8               at a setting of its own: 8 tokens merged in each block
tome-flash           without proportional attention, so that flash kernels can run: what the paper compares with
apt-entropy          every photo keeps that share; scored by entropy, or whatever scorer is named
apt-entropy-global   one threshold for all photos: busy ones keep more
apt-glance+tome      adaptive patches first, then ToMe in three of the blocks for the rest of the way
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aptvit.calibration.calibrator import calibrate
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.pretrained import Host
from aptvit.merging import ReducedAdaptive, dtem, evit, fit_dtem, random, resize, tome
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.scoring import get_scorer
from aptvit.scorers import SCORERS
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.scorers.learned import GLANCE

__all__ = ["DEFAULT_METHODS", "RIVALS", "UNIFORM", "Method", "Prepared", "Surroundings", "parse_methods", "prepare"]

T = TypeVar("T")

RIVALS = ("random", "resize", "downscale", "tome", "tome-flash", "evit", "dtem", "dtem-flash")
DEFAULT_METHODS = (
    *("apt-glance+tome", "apt-glance", "apt-embedding", "apt-entropy", "apt-entropy-global"),
    *("random", "downscale", "tome", "evit"),
)

_OURS = re.compile(r"apt-(?P<scorer>\w+?)(?P<is_global>-global)?(?P<merges>\+tome)?")
_OWN_SETTINGS = {
    "downscale": "a side in pixels",
    **dict.fromkeys(("tome", "tome-flash", "dtem", "dtem-flash"), "tokens to merge in each block"),
}
_TOLERANCE = 0.05  # share of the tokens: a method that cannot go below 51 % still answers when 50 % are asked for
_DTEM_R = 16  # what its authors train with


@dataclass(frozen=True, order=True)
class Method:
    """A way to spend fewer tokens, and how far it goes.

    Attributes:
        name: One of `RIVALS`, "uniform", "apt-SCORER" or "apt-SCORER-global".
        keep: Share of the tokens asked for; None where ``setting`` is given.
        setting: The method's own setting: tokens merged per block, the side of the picture, EViT's keep rate.
    """

    name: str
    keep: float | None = None
    setting: float | None = None

    @property
    def is_ours(self) -> bool:
        return _OURS.fullmatch(self.name) is not None

    def __str__(self) -> str:
        if self.setting is not None:
            return f"{self.name}@{self.setting:g}"
        return self.name if self.keep is None else f"{self.name} at {100 * self.keep:g} %"


UNIFORM = Method("uniform")


def parse_methods(names: Iterable[str], keep: Sequence[float]) -> list[Method]:
    """Methods from names as a person writes them; the uniform model is always the first.

    Args:
        names: Each a name, which is run at every share of ``keep``, or ``name@value``. The value is a share for those
            that keep a share of the patches, and the method's own setting for the others.
        keep: Shares of the tokens.

    Raises:
        ValueError: If there is no method of that name, or a value is out of range.
    """
    for share in keep:
        if not 0 < share <= 1:
            raise ValueError(f"keep={share:g} must be a share of the tokens in (0, 1]")
    methods = [UNIFORM]
    for word in names:
        name, at, value = word.strip().partition("@")
        _check_name(name)
        if name == UNIFORM.name:
            continue
        methods += [_with_value(name, value)] if at else [Method(name, share) for share in keep]
    methods = list(dict.fromkeys(methods))
    if len(methods) == 1:
        raise ValueError("there is nothing to compare with the uniform model: give at least one method and share")
    return methods


def _check_name(name: str) -> None:
    ours = _OURS.fullmatch(name)
    if ours is not None:
        _check_scorer(ours["scorer"])
    elif name not in (*RIVALS, UNIFORM.name):
        known = ", ".join((UNIFORM.name, *RIVALS))
        raise ValueError(
            f"unknown method {name!r}: use {known}, apt-SCORER, apt-SCORER-global or apt-SCORER+tome, as in apt-entropy"
        )


def _check_scorer(scorer: str) -> None:
    if scorer not in SCORERS:
        get_scorer(scorer)


def _with_value(name: str, word: str) -> Method:
    try:
        value = float(word)
    except ValueError:
        raise ValueError(f"{name}@{word}: what follows @ must be a number") from None
    if name in _OWN_SETTINGS:
        if not value.is_integer() or value < (1 if name == "downscale" else 0):
            raise ValueError(f"{name}@{word}: what follows @ is {_OWN_SETTINGS[name]}, a whole number")
        return Method(name, setting=value)
    if not 0 < value <= 1:
        raise ValueError(f"{name}@{word}: what follows @ is a share in (0, 1]")
    return Method(name, setting=value) if name == "evit" else Method(name, keep=value)


# From a name to something that runs


@dataclass(frozen=True)
class Surroundings:
    """What methods are made from.

    Attributes:
        host: The uniform model, on its device and in its type.
        dtype: The type.
        scales: Patch sizes of adaptive models, the base size included.
        samples: Gives normalised batches, to be read as often as wished, for methods that want to see photos before:
            to calibrate, to fit.
        samples_are_others: Whether they are other photos than those that are measured.
        fit_steps: Batches that a method is fitted on.
    """

    host: Host
    dtype: torch.dtype
    scales: int
    samples: Callable[[], Iterable[Tensor]]
    samples_are_others: bool
    fit_steps: int = 100

    @property
    def vit(self) -> Any:
        return self.host.model

    @property
    def size(self) -> int:
        """Side of the picture in pixels."""
        return self.host.data["input_size"][-1]

    @property
    def num_prefix_tokens(self) -> int:
        return self.vit.num_prefix_tokens

    @property
    def num_patches(self) -> int:
        rows, cols = self.vit.patch_embed.grid_size
        return rows * cols

    @property
    def num_tokens(self) -> int:
        """Tokens of the uniform model, prefix tokens included."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def whose(self) -> str:
        return "other photos" if self.samples_are_others else "these photos"

    def tokens_at(self, keep: float) -> float:
        """Tokens of an image that keeps this share of its patches."""
        return self.num_prefix_tokens + keep * self.num_patches

    @cached_property
    def dtem_metric(self) -> dict[str, Tensor]:
        """What DTEM compares tokens by, fitted to the uniform model's answers by its authors' recipe, at their r.

        It is fitted once and serves every r, as theirs does.
        """
        vit = copy.deepcopy(self.vit).float()  # small steps are lost in half precision
        reduced = dtem(vit, _DTEM_R)
        fit_dtem(reduced, _Answered(vit, self.samples()), steps=self.fit_steps)
        metric: dict[str, Tensor] = reduced.reduction.state_dict()
        return metric

    @cached_property
    def glance(self) -> dict[str, Tensor]:
        """Where the model looks, learned from the model itself; it is fitted once and serves every share."""
        model = AdaptivePatchTransformer(self.vit, scorer=GlanceScorer.name)
        fit_glance(model, self.samples())
        state: dict[str, Tensor] = getattr(model, GLANCE).state_dict()
        return state


class _Answered:
    """Batches with the answers of a model, as often as they are read; kept in memory they could be too many."""

    def __init__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        self.model, self.batches = model, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images in self.batches:
            with torch.no_grad():
                answers = self.model(images).softmax(1)  # (B, C, H, W) -> (B, num_classes)
            yield images, answers


@dataclass(frozen=True)
class Prepared:
    """A method that is ready to run.

    Attributes:
        model: What runs.
        run: Normalised images (B, C, size, size) -> logits (B, classes).
        size: Side of the pictures that it reads, in pixels.
        setting: What was set, in words.
        tokens: Tokens that enter a block, prefix tokens included, for each image of a batch: the mean over the blocks.
    """

    model: nn.Module
    run: Callable[[Tensor], Tensor]
    size: int
    setting: str
    tokens: Callable[[Tensor], list[float]]


def prepare(method: Method, given: Surroundings) -> Prepared:
    """Build a method for a host.

    Args:
        method: Which one, and how far it is to go.
        given: The host and its surroundings.

    Raises:
        ValueError: If the method cannot run on this host, or cannot go that far.
        ImportError: If what it needs is not installed.
    """
    return (_prepare_ours if method.is_ours else _RIVALS[method.name])(method, given)


def _uniform(method: Method, given: Surroundings) -> Prepared:
    return _dense(given.vit, given, given.size, "", given.num_tokens)


def _dense(model: nn.Module, given: Surroundings, size: int, setting: str, tokens: float) -> Prepared:
    """A model whose images all have equally many tokens."""
    # FLOP counters stumble over parameters that want a gradient where there is none to be had.
    model.eval().requires_grad_(False)

    def run(images: Tensor) -> Tensor:
        return model(images.to(given.dtype))

    return Prepared(model, run, size, setting, lambda images: [tokens] * len(images))


# Ours


def _prepare_ours(method: Method, given: Surroundings) -> Prepared:
    ours = _OURS.fullmatch(method.name)
    assert ours is not None and method.keep is not None
    scorer = ours["scorer"]
    if ours["merges"]:
        return _prepare_both(method, given, scorer)
    if not ours["is_global"]:
        model = AdaptivePatchTransformer(given.vit, keep=method.keep, scales=given.scales, scorer=scorer)
        setting = f"{100 * method.keep:g} % of every photo" + _fit(model, given)
        return _adaptive(model, given, setting)
    model = AdaptivePatchTransformer(given.vit, scales=given.scales, scorer=scorer)
    _fit(model, given)
    thresholds = calibrate(model, given.samples(), keep=method.keep)
    # One threshold serves all scales.
    return _adaptive(model, given, f"threshold {thresholds[0]:.4g}, calibrated on {given.whose}")


def _prepare_both(method: Method, given: Surroundings, scorer: str) -> Prepared:
    """Adaptive patches go half of the way, at most 16 % of the tokens above its end; ToMe goes the rest."""
    assert method.keep is not None
    first = min((1 + method.keep) / 2, method.keep + 0.16)
    model = AdaptivePatchTransformer(given.vit, keep=first, scales=given.scales, scorer=scorer)
    said = _fit(model, given)
    model.eval().requires_grad_(False)
    kept = given.num_tokens - 3 * round((1 - first) * given.num_patches / 3)
    schedules = [_three_steps(len(given.vit.blocks), kept, percent / 100) for percent in range(50)]

    def merged(schedule: list[int]) -> ReducedAdaptive:
        both = tome(model, schedule)
        assert isinstance(both, ReducedAdaptive)
        return both

    def tokens(schedule: list[int]) -> float:
        return _mean_tokens(merged(schedule), given)

    schedule = _choose(method, given, schedules, tokens, lambda _: schedules[0])
    steps = [r for r in schedule if r]
    setting = f"{100 * first:.0f} % of every photo, then r = {', '.join(map(str, steps))}{said}"
    both, count = merged(schedule), tokens(schedule)
    return Prepared(both, both, given.size, setting, lambda images: [count] * len(images))


def _three_steps(depth: int, num_tokens: int, share: float) -> list[int]:
    """Tokens to merge in each block: this share of those left after a third, a half and two thirds of the blocks."""
    schedule = [0] * depth
    for block in (depth // 3, depth // 2, 2 * depth // 3):
        schedule[block] = round(share * num_tokens)
        num_tokens -= schedule[block]
    return schedule


def _fit(model: AdaptivePatchTransformer, given: Surroundings) -> str:
    """Teach a glance, if the model has one. -> what to say of it"""
    if not isinstance(model.patchifier.scorer, GlanceScorer):
        return ""
    getattr(model, GLANCE).load_state_dict(given.glance)
    return f", glance fitted on {given.whose}"


def _adaptive(model: AdaptivePatchTransformer, given: Surroundings, setting: str) -> Prepared:
    model.eval().requires_grad_(False)
    return Prepared(model, model, given.size, setting, lambda images: [float(n) for n in model.layout(images).seqlens])


# Rivals


def _resize(method: Method, given: Surroundings) -> Prepared:
    assert method.keep is not None
    model = resize(given.vit, keep=method.keep, scales=given.scales)
    return _adaptive(model, given, f"{100 * method.keep:g} % of every photo")


def _random(method: Method, given: Surroundings) -> Prepared:
    assert method.keep is not None
    model = random(given.vit, keep=method.keep)
    return _dense(model, given, given.size, f"{100 * method.keep:g} % of every photo", _mean_tokens(model, given))


def _downscale(method: Method, given: Surroundings) -> Prepared:
    """The host on a smaller picture: `aptvit.merging.downscale` with positions resampled once, not in each forward."""
    patch = given.vit.patch_embed.patch_size[0]
    # From the whole picture down, so that tokens fall.
    sides = range(given.size // patch * patch, 0, -patch)

    def tokens(side: int) -> float:
        return given.num_prefix_tokens + (side // patch) ** 2

    side = _choose(method, given, sides, tokens, int)
    if side > given.size or side % patch:
        raise ValueError(f"a picture of {side} pixels is no multiple of the patches of {patch} up to {given.size}")
    vit: Any = share_parameters(given.vit)
    if not hasattr(vit, "set_input_size"):
        raise ValueError(f"a {type(vit).__name__} is built for one size and cannot read smaller pictures")
    vit.set_input_size(img_size=side)
    return _dense(vit, given, side, f"{side} px", tokens(side))


def _tome(method: Method, given: Surroundings) -> Prepared:
    r = _tokens_per_block(method, given)
    model = tome(given.vit, r, prop_attn=method.name == "tome")
    return _dense(model, given, given.size, f"r = {r}", _mean_tokens(model, given))


def _dtem(method: Method, given: Surroundings) -> Prepared:
    r = _tokens_per_block(method, given)
    model = dtem(given.vit, r, prop_attn=method.name == "dtem")
    model.reduction.load_state_dict(given.dtem_metric)
    setting = f"r = {r}, fitted in {given.fit_steps} steps on {given.whose}"
    return _dense(model, given, given.size, setting, _mean_tokens(model, given))


def _tokens_per_block(method: Method, given: Surroundings) -> int:
    """r of ToMe and DTEM, which merge equally many."""

    def tokens(r: int) -> float:
        return _mean_tokens(tome(given.vit, r), given)

    return _choose(method, given, range(given.num_tokens // 2 + 1), tokens, int)


def _evit(method: Method, given: Surroundings) -> Prepared:
    def tokens(rate: float) -> float:
        return _mean_tokens(evit(given.vit, rate), given)

    rates = [percent / 100 for percent in range(100, 0, -1)]
    rate = _choose(method, given, rates, tokens, float)
    return _dense(evit(given.vit, rate), given, given.size, f"keep rate {rate:g}", tokens(rate))


def _mean_tokens(model: Any, given: Surroundings) -> float:
    per_block: list[int] = model.tokens_per_block(tuple(given.vit.patch_embed.grid_size))
    return sum(per_block) / len(per_block)


def _choose(
    method: Method,
    given: Surroundings,
    settings: Sequence[T],
    tokens: Callable[[T], float],
    kind: Callable[[float], T],
) -> T:
    """The setting that was given, or the one whose tokens are nearest to the share that was asked for.

    Args:
        method: What was asked for.
        given: The host.
        settings: All there are; tokens fall from one to the next.
        tokens: Mean tokens that enter a block.
        kind: Type of a setting.
    """
    if method.setting is not None:
        return kind(method.setting)
    assert method.keep is not None
    wanted = given.tokens_at(method.keep)
    least = tokens(settings[-1])
    if least > wanted + _TOLERANCE * given.num_tokens:
        raise ValueError(
            f"{method.name} cannot go down to {method.keep:.0%} of the tokens on this model: "
            f"{least / given.num_tokens:.0%} is the least"
        )
    place = bisect_left(settings, -wanted, key=lambda one: -tokens(one))
    return min(settings[max(0, place - 1) : place + 1], key=lambda one: abs(tokens(one) - wanted))


_RIVALS: dict[str, Callable[[Method, Surroundings], Prepared]] = {
    "uniform": _uniform,
    "random": _random,
    "resize": _resize,
    "downscale": _downscale,
    "tome": _tome,
    "tome-flash": _tome,
    "evit": _evit,
    "dtem": _dtem,
    "dtem-flash": _dtem,
}
